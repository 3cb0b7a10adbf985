set -u
export PYTHONUNBUFFERED=1 OUT OMP_NUM_THREADS=2 RAYON_NUM_THREADS=8 TOKENIZERS_PARALLELISM=true
T0=$(date +%s); N=${N:-4}; PY=${PY:-python3}; W=${W:-/tmp/runs}; DT=${DT:-bfloat16}; HERE=.bench/go
if [ -d .bench/whl ] && [ ! -d /tmp/site/imageio ]; then for w in .bench/whl/*.whl; do $PY -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site $w; done; fi
export PYTHONPATH=/tmp/site
mkdir -p $W; R=/tmp/root; rm -rf $R; cp -r .bench/root $R
now() { echo $(( $(date +%s) - T0 )); }
# end what torchrun has left, by the ids of its children
ended() { for p in /proc/[0-9]*; do if tr '\0' ' ' < $p/cmdline 2>/dev/null | grep -q "go/timed.py"; then kill -9 ${p#/proc/} 2>/dev/null; fi; done; }
tidy() { tr '\r' '\n' < $W/$1.log | grep -v "step/s\|it/s" | tail -${TAIL:-10} | cut -c1-330 > $OUT/$1.txt; cat $OUT/$1.txt; }
# run NAME KILL_AFTER SECONDS ARGUMENTS: on $N GPUs
run() { local name=$1 limit=$2 secs=$3; shift 3; timeout -s TERM -k 30 $limit $PY -m torch.distributed.run --nproc_per_node $N --master_port $(( 29500 + RANDOM % 400 )) $HERE/timed.py $R $secs "$@" > $W/$name.log 2>&1; echo "== $name rc $? at $(now) s"; tidy $name; ended; }
one() { local gpu=$1 name=$2 limit=$3 secs=$4; shift 4; CUDA_VISIBLE_DEVICES=$gpu LABEL=$name timeout -s TERM -k 30 $limit $PY $HERE/timed.py $R $secs "$@" >> $W/$name.log 2>&1; echo "== $name rc $? at $(now) s"; }
