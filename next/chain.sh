# chain.sh: from the parts (VAE and VLM: D or E, by default the better ones) MMDiT, stages 1 to 3. LIMIT seconds in all
. .bench/go/common.sh
B=${B:-256}; X="--dtype=$DT"; E=${E:-2048}; LIMIT=${LIMIT:-560}
S3="train --stage=3 --shard=ddp --weights=$W/stage2/final.safetensors --out=$W/stage3 --batch=$B --encode-once=$E --short=0.75 --lr=${LR:-2e-3} --config=/tmp/s3.json $X"
echo '{"training": {"3": {"area": 4096, "checkpointing": false, "warmup": 100, "ema": 0.998, "shift": 3.0, "mixture": {"t2i": 0.14, "t2v": 0.14, "i2v": 0.06, "motion": 0.06, "ti2i": 0.16, "ti2i_ref": 0.08, "ti2v": 0.13, "tv2v": 0.13, "tiv2v": 0.10}}}}' > /tmp/s3.json
if [ ! -f $W/stage2/final.safetensors ]; then
VLM=${VLM:-} VAE=${VAE:-} $PY $HERE/assemble.py $R $W $W/base.safetensors > $OUT/assemble.txt 2>&1; rc=$?; cat $OUT/assemble.txt; [ $rc = 0 ] || exit 3
echo "== assemble at $(now) s"
run mmdit $(( ${TM:-100} + 60 )) ${TM:-100} 0.33 pretrain --part=mmdit --weights=$W/base.safetensors --out=$W/pre --batch=$B $X
run s1 $(( ${T1:-20} + 60 )) ${T1:-20} 0 train --stage=1 --shard=ddp --weights=$W/pre-mmdit/final.safetensors --out=$W/stage1 --batch=$B --encode-once=$E $X
run s2 $(( ${T2:-45} + 60 )) ${T2:-45} 0.3 train --stage=2 --shard=ddp --weights=$W/stage1/final.safetensors --out=$W/stage2 --batch=$B --encode-once=$E $X
fi
[ -d $W/stage3/checkpoints ] && S3="$S3 --resume"
left=$(( LIMIT - $(now) ))
run s3 $left ${SPAN3:-600} 0.3 $S3
tr '\r' '\n' < $W/s3.log | grep "step/s" | tail -2 | cut -c1-200
$PY $HERE/home.py $W
echo "== chain end at $(now) s"
