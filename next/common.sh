set -u
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=2 RAYON_NUM_THREADS=8 TOKENIZERS_PARALLELISM=true
T0=$(date +%s); N=${N:-4}; PY=${PY:-python3}; export W=${W:-/tmp/runs}; DT=${DT:-bfloat16}; HERE=${HERE:-/tmp/go}; R=${R:-/tmp/root}
export PYTHONPATH=/tmp/site
now() { echo $(( $(date +%s) - T0 )); }
# end what torchrun has left, by the ids of its children
ended() { for p in /proc/[0-9]*; do if tr '\0' ' ' < $p/cmdline 2>/dev/null | grep -q "go/timed.py.*$1"; then kill -9 ${p#/proc/} 2>/dev/null; fi; done; }
# run NAME GPUS KILL_AFTER SECONDS ARGUMENTS
run() { local name=$1 gpus=$2 limit=$3 secs=$4; shift 4; local n=$(echo $gpus | tr ',' '\n' | wc -l)
  CUDA_VISIBLE_DEVICES=$gpus timeout -s TERM -k 30 $limit $PY -m torch.distributed.run --nproc_per_node $n --master_port $(( 29500 + RANDOM % 400 )) $HERE/timed.py $R $secs "$@" > $W/$name.log 2>&1; echo "== $name rc $? at $(now) s"; ended "--out=$W/$name"; }
one() { local gpu=$1 name=$2 limit=$3 secs=$4; shift 4; CUDA_VISIBLE_DEVICES=$gpu LABEL=$name timeout -s TERM -k 30 $limit $PY $HERE/timed.py $R $secs "$@" > $W/$name.log 2>&1; echo "== $name rc $? at $(now) s"; }
