# ablate.sh NAME GPU SEED FLAGS: one chain: stages 1, 2, 3 (or 3 alone, if NAME begins with "only"), then benchmarks
W=${W:-/tmp/abl} R=${R:-/tmp/root} PY=${PY:-python3}; NAME=$1 GPU=$2 SEED=$3; shift 3
export CUDA_VISIBLE_DEVICES=$GPU OMP_NUM_THREADS=2 RAYON_NUM_THREADS=4 TOKENIZERS_PARALLELISM=true PYTHONPATH=/tmp/site PYTHONUNBUFFERED=1
S1=${S1:-300} S3=${S3:-1400} B=${B:-256} S=${S:-100}; T0=$(date +%s); D=$W/$NAME; mkdir -p $D; cd $R
say() { echo "== $NAME $* at $(( $(date +%s) - T0 )) s"; }
tr() { local st=$1 steps=$2 w=$3 b=$4; shift 4; $PY train.py --stage $st --weights $w --out $D/stage$st --steps $steps --batch $b --seed $SEED --save-every 100000 --validate-every 0 "$@" > $D/stage$st.log 2>&1; say "stage $st rc $?"; }
bench() { local w=$1 out=$2; shift 2; $PY -m toy.benchmark "$@" --weights $w --samples $S --out $D/$out ${STEPS:-} > $D/$out.log 2>&1; say "$out rc $?"; }
E="--encode-once ${E1:-2048}"; LAST=$W/base0.safetensors; N3=$S3
case $NAME in
  only*) N3=$(( S3 + S1 ));;
  *) tr 1 $S1 $LAST $B $E "$@"; LAST=$D/stage1/final.safetensors; tr 2 $S1 $LAST $B $E --cooldown $(( S1 * 3 / 10 )) "$@"; LAST=$D/stage2/final.safetensors;;
esac
tr 3 $N3 $LAST $(( 2 * B )) $E --lr 2e-3 --warmup ${WARM:-100} --cooldown $(( S3 * 35 / 100 )) --ema 0.998 ${COMP---compile} "$@"
bench $D/stage3/final.safetensors b3 geneval opens2v gedit openve
bench $D/stage3/final.safetensors b3n geneval --no-rewrite
case $NAME in base*) for st in 1 2; do bench $D/stage$st/final.safetensors b$st geneval --no-rewrite; done;; esac
touch $D/done; say done
