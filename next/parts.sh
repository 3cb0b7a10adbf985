# parts.sh: the VLM on GPU 0, and compiled on GPU 1; on the others first a trial of stage 3 (how fast is a step, and why), then the MMDiT. The VAE is made
. ${HERE:-/tmp/go}/common.sh
cd $R; export OUT=$W/home; mkdir -p $OUT; B=${B:-256}; X="--dtype=$DT"; C=${C---compile}; G=${G:-2,3}; A=${G%%,*}; Z=${G##*,}
SL=${SL:-790}; P=
resume() { [ -d $W/$1/checkpoints ] && echo --resume; }
for v in "0 vlm stage0" "${G1:-1} vlmc stage0c $C"; do set -- $v
[ -f $W/$3-vlm/final.safetensors ] || { SAVE=500 one $1 $2 $((SL+90)) $SL 0.65 pretrain --part=vlm --weights=$W/base1.safetensors --out=$W/$3 --batch=${B2:-256} $X ${4:-} $(resume $3-vlm) & P="$P $!"; }
done
if [ ! -d $W/trial ] && [ ! -f $W/stage0-mmdit/final.safetensors ]; then
# the first house and this one, side by side, on GPUs 2 and 3: 256 samples a step, nothing compiled
mkdir -p $W/old; ( cd $HERE/../old 2>/dev/null && CUDA_VISIBLE_DEVICES=$A timeout -k 5 75 $PY -W ignore train.py --stage 3 --weights random --config tiny_config.json --batch $B --steps ${OLD:-100} --validate-every 1000000 --save-every 1000000 --out $W/old > $W/old.log 2>&1; echo "== old rc $? at $(now) s" ) &
O=$!
one $Z trial0 75 ${TT:-30} 0 train --stage=3 --weights=$W/base1.safetensors --out=$W/trial0 --batch=$B --encode-once=${E0:-512} $X
wait $O
run trial1 $A 150 ${TT:-40} 0 train --stage=3 --shard=ddp --weights=$W/base1.safetensors --out=$W/trial1 --batch=$B --encode-once=${E0:-512} $X $C
TRIAL=1 run trial $G 200 ${TT:-50} 0 train --stage=3 --shard=ddp --weights=$W/base1.safetensors --out=$W/trial --batch=$B --encode-once=${E0:-512} $X $C
fi
if [ ! -f $W/stage0-mmdit/final.safetensors ]; then
TM=$(( SL - $(now) - 15 )); [ $TM -gt ${TMAX:-300} ] && TM=${TMAX:-300}; [ $TM -gt 20 ] || TM=20
SAVE=2000 run mmdit $G $((TM+90)) $TM 0.33 pretrain --part=mmdit --weights=$W/base1.safetensors --out=$W/stage0 --batch=$((2*B)) $X $C
fi
wait $P
$PY $HERE/assemble.py $R $($PY $HERE/better.py $W) $W/stage0-mmdit/final.safetensors $W/base.safetensors > $OUT/assemble.txt 2>&1; echo "== assemble rc $? at $(now) s"; cat $OUT/assemble.txt
touch $W/parts-done
