# Sourced by the other scripts: makes .venv and installs requirements.txt where that is not done yet.
# EXTRA="qlora …" installs requirements-qlora.txt and so on too, and keeps them.
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
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$file"
        echo "$wanted" > "$stamp"
    fi
done
