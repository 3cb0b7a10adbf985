# go.sh SECONDS: start what is not started, wait, and bring home what there is. The same command again and again, until it says ALL DONE.
# A fresh machine (no file .bench/first) says LOST and does nothing.
export W=${W:-/tmp/runs} HERE=${HERE:-/tmp/go} R=${R:-/tmp/root}; SRC=${SRC:-.bench}
if [ ! -d $W ]; then
  [ -f $SRC/first ] || { echo LOST; exit 0; }
  mkdir -p $W; cp -r $SRC/go $HERE; cp -r $SRC/root $R; cp $SRC/base3.safetensors $W/; [ -d $SRC/state ] && cp -r $SRC/state/. $W/
  for w in $SRC/whl/*.whl; do ${PY:-python3} -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site $w; done
  [ -f $W/end ] || echo $(( $(date +%s) + ${SPAN:-1590} )) > $W/end
fi
[ -f $SRC/hook.sh ] && bash $SRC/hook.sh  # what has occurred to us since
for k in $(seq $1); do
  for p in parts chain; do
    { [ $p = chain ] && [ ! -f $W/parts-done ]; } || { [ $p = parts ] && [ -f $W/parts-done ]; } || [ -f $W/$p-on ] || { touch $W/$p-on; setsid nohup bash $HERE/$p.sh > $W/$p.log 2>&1 < /dev/null & }
  done
  [ -f $W/all-done ] && break; sleep 1
done
cat $W/parts.log $W/chain.log 2>/dev/null
for f in vlm stage1 stage3; do [ -f $W/$f.log ] && { echo "-- $f"; tr '\r' '\n' < $W/$f.log | grep "step/s," | tail -1 | cut -c1-160; tr '\r' '\n' < $W/$f.log | grep -a -v "it/s\|step/s,\|^ *$" | tail -${TAIL:-3} | cut -c1-330; }; done
cat $W/bench-?/benchmark.md 2>/dev/null
PYTHONPATH=/tmp/site ${PY:-python3} $HERE/home.py $W
echo "end $(cat $W/end) now $(date +%s)"; ls -la $OUT | cut -c20-; [ -f $W/all-done ] && echo "ALL DONE"; exit 0
