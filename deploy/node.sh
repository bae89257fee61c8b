#!/usr/bin/env bash
# Ray on a machine that nobody switches off:  node.sh HEAD_ADDRESS RESOURCES
# `ray down` reaches the head only. So the node's processes end by themselves when the head has been gone for 15 s, and
# what Ray leaves of them (agents that want to tell the head about it) is ended too.
set -euo pipefail
run=$(cd "$(dirname "$0")" && pwd)

if [ -s "$run/node.pid" ]; then kill "$(cat "$run/node.pid")" 2>/dev/null || true; fi
ray stop --force
setsid nohup bash -c '
  echo $$ >"$1/node.pid"
  RAY_gcs_rpc_server_reconnect_timeout_s=15 ray start --block --address="$2" --resources="$3"
  ray stop --force
  rm "$1/node.pid"
' node "$run" "$1" "$2" </dev/null >"$run/ray.log" 2>&1 &
sleep 2  # until it has left the session that ends with this command
