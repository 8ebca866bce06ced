#!/usr/bin/env bash
# Measure on one GPU, part by part, each under 9 minutes; what is done is not done again.
#
#   benchmarks/gpu/run_all.sh [--small] [--out FOLDER] [PART...]
#
# Needs torch with CUDA, triton, transformers and peft, and no network; uses Liger, cut-cross-entropy, TRL,
# bitsandbytes, vLLM and Ray where they are installed, and says what it left out. A part that has its gpu-PART.json
# in FOLDER (benchmarks/results) is skipped: remove the file to measure it again. PARTs named: only those run.
# --small runs toy sizes on the CPU into runs/gpu-small: it proves the code and measures nothing.
set -uo pipefail
cd "$(dirname "$0")/../.."
PARTS=(environment ceilings heads forest learner steps online colocated transports)
OUT=benchmarks/results SMALL=() CHOSEN=()
while (($#)); do
  case "$1" in
    --small) SMALL=(--small); OUT=runs/gpu-small ;;
    --out) OUT="$2"; shift ;;
    -*) echo "run_all.sh: unknown option $1" >&2; exit 2 ;;
    *) [[ " ${PARTS[*]} " == *" $1 "* ]] || { echo "run_all.sh: no part $1; there are ${PARTS[*]}" >&2; exit 2; }
       CHOSEN+=("$1") ;;
  esac
  shift
done
((${#CHOSEN[@]})) || CHOSEN=("${PARTS[@]}")
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
mkdir -p "$OUT"
failed=()
for part in "${CHOSEN[@]}"; do
  if [[ -f "$OUT/gpu-$part.json" ]]; then
    echo "[gpu] $part: done before"
    continue
  fi
  began=$SECONDS
  timeout -k 10 530 "${PYTHON:-python3}" "benchmarks/gpu/$part.py" "${SMALL[@]}" --out "$OUT"
  code=$?
  echo "[gpu] $part: exit code $code after $((SECONDS - began)) s"
  ((code)) && failed+=("$part")
done
if ((${#failed[@]})); then
  echo "[gpu] FAILED: ${failed[*]}. Remedy: the messages above; a second call runs only what is missing" >&2
  exit 1
fi
