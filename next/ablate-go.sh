# go.sh SECONDS: start what is not started, wait, bring home texts
SECONDS_TO_WAIT=${1:-60}
export W=${W:-/tmp/abl} R=${R:-/tmp/root} PY=${PY:-python3}; SRC=${SRC:-.bench}; N=${N:-4}
if [ ! -d $W ]; then
  mkdir -p $W; cp -r $SRC/root $R; cp $SRC/base0.safetensors $W/; cp -r $SRC/go $W/go
  for w in $SRC/whl/*.whl; do $PY -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site $w; done
  i=0
  for c in "base0 0" "nob0 0 --no-boundary-tokens" "noq0 0 --no-queries" "only0 0" "base1 1" "nob1 1 --no-boundary-tokens" "noq1 1 --no-queries" "only1 1"; do
    set -- $c; name=$1 seed=$2; shift 2
    setsid nohup bash $W/go/ablate.sh $name $(( i % N )) $seed "$@" > $W/$name.log 2>&1 < /dev/null &
    i=$(( i + 1 )); sleep 1
  done
fi
for k in $(seq $SECONDS_TO_WAIT); do [ $(ls $W/*/done 2>/dev/null | wc -l) = 8 ] && { echo ALL DONE; break; }; sleep 1; done
cat $W/*.log; for d in $W/*/; do for s in 1 2 3; do f=$d/stage$s.log; [ -f $f ] && { echo "-- $f"; tr '\r' '\n' < $f | grep -a . | tail -2 | cut -c1-200; }; done; done
nvidia-smi --query-gpu=utilization.gpu,memory.used --format=csv 2>/dev/null; uptime
(cd $W && tar czf $OUT/abl.tar.gz --exclude='*.safetensors' --exclude=checkpoints --exclude='*.png' --exclude='go' .)
