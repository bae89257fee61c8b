#!/usr/bin/env bash
# Makes a cluster's secrets:  ./secrets.sh ROUTER...     ROUTER: names and addresses under which clients reach the head
#
#   secrets/authority/    the key that signs; stays here, and should not stay on a laptop
#   secrets/nodes/        what nodes get: certificates, their keys, the token clients must send
#   secrets/ray_token     what Ray's own processes show each other
#   secrets/client/       what clients get: ca.pem and router_token
#
# Run again it keeps what is there and renews the certificates, which live for a year.
set -euo pipefail
umask 077
test $# -gt 0 || { sed -n '2,3p' "$0" >&2; exit 2; }
cd "$(dirname "$0")"
mkdir -p secrets/authority secrets/nodes secrets/client
cd secrets

new_key() { test -s "$1" || openssl ecparam -name prime256v1 -genkey -noout -out "$1"; }
names() {
  for each in "$@"; do
    if [[ $each =~ ^[0-9.]+$ || $each == *:* ]]; then echo "IP:$each"; else echo "DNS:$each"; fi
  done | paste -sd,
}
sign() { # file, common name, alternative names
  openssl req -new -key "nodes/$1-key.pem" -subj "/CN=$2" -out "nodes/$1.csr"
  openssl x509 -req -in "nodes/$1.csr" -CA authority/ca.pem -CAkey authority/ca-key.pem -CAcreateserial -days 365 \
    -extfile <(printf 'subjectAltName=%s\nbasicConstraints=critical,CA:FALSE\n' "$3") -out "nodes/$1.pem" 2>/dev/null
  rm "nodes/$1.csr"
}

new_key authority/ca-key.pem
test -s authority/ca.pem || openssl req -x509 -new -key authority/ca-key.pem -subj "/CN=Tidemill cluster" -days 3650 \
  -addext 'basicConstraints=critical,CA:TRUE' -out authority/ca.pem
new_key nodes/node-key.pem
new_key nodes/router-key.pem
sign node tidemill-node DNS:tidemill-node
sign router "$1" "$(names "$@")"
test -s nodes/router_token || openssl rand -hex 32 >nodes/router_token
test -s ray_token || openssl rand -hex 32 >ray_token
cp authority/ca.pem nodes/ca.pem
cp authority/ca.pem nodes/router_token client/
