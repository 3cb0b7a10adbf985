# parts.sh: the VLM goes on, on all GPUs, from base.safetensors, in float32 (the vision tower's gradients were not finite in bfloat16)
. ${HERE:-/tmp/go}/common.sh
cd $R; export OUT=$W/home; mkdir -p $OUT; G=$(seq -s, 0 $((N-1))); SL=${SL:-600}
for try in 1 2 3; do
RES=; [ -d $W/stage0-vlm/checkpoints ] && RES=--resume
[ -f $W/stage0-vlm/final.safetensors ] || SAVE=500 run vlm $G $((SL+290)) $SL 0.65 pretrain --part=vlm --weights=$W/base3.safetensors --out=$W/stage0 --batch=${B2:-512} --lr=${LRV:-1.2e-3} --dtype=float32 $RES
done
cp $W/stage0-vlm/final.safetensors $W/base.safetensors && touch $W/parts-done
