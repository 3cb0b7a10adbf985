# parts.sh: the VLM, on all GPUs, from base2 (VAE and MMDiT are made)
. ${HERE:-/tmp/go}/common.sh
cd $R; export OUT=$W/home; mkdir -p $OUT; G=$(seq -s, 0 $((N-1))); SL=${SL:-660}
RES=; [ -d $W/stage0-vlm/checkpoints ] && RES=--resume
[ -f $W/stage0-vlm/final.safetensors ] || SAVE=500 run vlm $G $((SL+90)) $SL 0.65 pretrain --part=vlm --weights=$W/base2.safetensors --out=$W/stage0 --batch=${B2:-256} --lr=${LRV:-2e-3} --dtype=$DT $RES
cp $W/stage0-vlm/final.safetensors $W/base.safetensors
touch $W/parts-done
