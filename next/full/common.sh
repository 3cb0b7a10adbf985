export PYTHONUNBUFFERED=1 TRANSFORMERS_VERBOSITY=error TOKENIZERS_PARALLELISM=false
T0=${T0:-$(date +%s)}
left() { echo $(( T0 + ${LIMIT:-560} - $(date +%s) )); }
PY=${PY:-python3}
PROMPT="a large red circle moves slowly to the left over a green wall while a small blue square turns and the evening light falls"
FULL=${FULL:-full.json}
clock() {  # clock NAME SECONDS COMMAND...: the whole command's wall time
  local name=$1 limit=$2; shift 2
  [ "$limit" -gt 20 ] || { echo "== $name: no time left"; return 1; }
  local b=$(date +%s.%N)
  timeout -k 5 $limit "$@"; local rc=$?
  echo "== $name: rc $rc, $($PY -c "import time; print(round(time.time() - $b, 1))") s, at $(( $(date +%s) - T0 )) s"
  return $rc
}
