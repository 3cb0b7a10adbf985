# chain.sh: stage 1 (the connectors follow the VLM) and stage 3 on all GPUs, from base; over at the second (of the epoch) that $W/end holds, benchmarks included
. ${HERE:-/tmp/go}/common.sh
cd $R; export OUT=$W/home; mkdir -p $OUT; B=${B:-256}; B3=$(cat $W/batch 2>/dev/null || echo $((2*B))); E=${E:-4096}; X="--dtype=$DT"; C=${C---compile}; G=$(seq -s, 0 $((N-1))); LB=${LB:-85}
[ -f $W/stage1/final.safetensors ] || run stage1 $G 110 ${T1:-35} 0.3 train --stage=1 --shard=ddp --weights=$W/base.safetensors --out=$W/stage1 --batch=$B --encode-once=1024 $X
echo '{"training": {"3": {"area": 4096, "checkpointing": false, "warmup": 100, "ema": 0.998, "shift": 3.0, "mixture": {"t2i": 0.14, "t2v": 0.14, "i2v": 0.06, "motion": 0.06, "ti2i": 0.16, "ti2i_ref": 0.08, "ti2v": 0.13, "tv2v": 0.13, "tiv2v": 0.10}}}}' > $W/s3.json
end=$(cat $W/end)
for try in 1 2 3; do
  [ -f $W/stage3/final.safetensors ] && break
  P=$(cat $W/stage3/spent 2>/dev/null || echo 0); P=${P%.*}; RES=; [ -d $W/stage3/checkpoints ] && RES=--resume
  L=$(( end - $(date +%s) - LB - 30 - ${START3:-75} )); [ $L -gt 30 ] || L=30; T3=$(( P + L )); echo "== stage 3 has $T3 s after its first step, $P spent, $X $C"
  SAVE=${SAVE:-400} run stage3 $G $((L+90)) $T3 0.35 train --stage=3 --shard=ddp --weights=$W/stage1/final.safetensors --out=$W/stage3 --batch=$B3 --encode-once=$E --short=0.75 --lr=${LR:-2e-3} --config=$W/s3.json $X $C $RES
  X=--dtype=float32; C=; B3=$B
done
bash $HERE/bench.sh
touch $W/all-done
echo "== all at $(now) s"
