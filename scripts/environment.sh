# Sourced by the other scripts: makes .venv and installs requirements.txt where that is not done yet.
# EXTRA="qlora real" installs requirements-qlora.txt and so on too, and keeps them; what cannot be had is noted.
# PYTHON names another interpreter (3.11 or newer).
cd "$(dirname "${BASH_SOURCE[0]}")/.."
for name in "" ${EXTRA:-}; do
    file=requirements${name:+-$name}.txt
    stamp=.venv/${file%.txt}.sha256
    wanted=$(sha256sum "$file" pyproject.toml | sha256sum)
    if [ ! -x .venv/bin/python ] || [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
        echo "Installing $file into .venv (a few minutes the first time) …"
        "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one with PYTHON=…")'
        [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
        # extras need nothing that requirements.txt lacks, and one of them names packages that are not wanted
        if .venv/bin/python -m pip install --quiet --disable-pip-version-check ${name:+--no-deps} -r "$file"; then
            echo "$wanted" > "$stamp"
        elif [ -z "$name" ]; then
            exit 1
        else
            echo "note: $file could not be installed; what needs it cannot run" >&2
        fi
    fi
done
