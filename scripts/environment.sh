# Sourced by the other scripts: makes .venv and installs requirements.txt where that is not done yet.
# PYTHON names another interpreter (3.11 or newer).
cd "$(dirname "${BASH_SOURCE[0]}")/.."
stamp=.venv/requirements.sha256
wanted=$(sha256sum requirements.txt pyproject.toml | sha256sum)
if [ ! -x .venv/bin/python ] || [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
    echo "Installing requirements.txt into .venv (a few minutes the first time) …"
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one with PYTHON=…")'
    [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    echo "$wanted" > "$stamp"
fi
