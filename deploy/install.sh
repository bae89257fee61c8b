#!/usr/bin/env bash
# Runs on every node, before Ray: Tidemill at the commit of source.env in ~/tidemill, and what it needs to run.
# Arguments are further packages, such as what Ray's autoscaler needs for a cloud. May be run again at any time.
set -euo pipefail
run=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=source.env
. "$run/source.env"

if [[ $REPOSITORY == */OWNER/* ]]; then
  echo "error: $REPOSITORY in deploy/source.env is an example. Set REPOSITORY to where your nodes can clone Tidemill" \
    "from, and COMMIT to one commit of it; then run \`ray up\` again." >&2
  exit 1
fi
test -d ~/tidemill/.git || git clone --quiet --no-checkout "$REPOSITORY" ~/tidemill
cd ~/tidemill
git cat-file -e "$COMMIT^{commit}" 2>/dev/null || git fetch --quiet origin
git checkout --quiet --force --detach "$COMMIT"

environment=${ENVIRONMENT:-$HOME/tidemill/.venv}
if [ -z "$ENVIRONMENT" ]; then
  test -x "$environment/bin/python" || python3 -m venv "$environment"
  "$environment/bin/python" -m pip install --quiet --disable-pip-version-check \
    --constraint requirements/dev.txt --editable '.[cluster]' "$@"
fi

cat >"$run/environment" <<END
export PATH=$environment/bin:\$PATH
export PYTHONPATH=$HOME/tidemill
export RAY_AUTH_MODE=token
END
line="source $run/environment"
touch ~/.bashrc
grep -qxF "$line" ~/.bashrc || { echo "$line" | cat - ~/.bashrc >~/.bashrc.new && mv ~/.bashrc.new ~/.bashrc; }
