set -u
export PYTHONUNBUFFERED=1 OUT
for w in .bench/whl/*.whl; do python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site $w; done
export PYTHONPATH=/tmp/site
mkdir -p /tmp/runs
R=.bench/pilot
cp -r .bench/pilot /tmp/pilot; R=/tmp/pilot
echo '{"vae": {"block_out_channels": [32, 48, 64, 64]}}' > /tmp/wide.json
python3 - <<'P'
import json
c = json.load(open("/tmp/pilot/tiny_config.json")); c["vae"]["block_out_channels"] = [32, 48, 64, 64]; json.dump(c, open("/tmp/wide.json", "w"))
P
(CUDA_VISIBLE_DEVICES=0 timeout 120 python3 .bench/vae_speed.py vae > $OUT/speeds.txt 2>&1
 CUDA_VISIBLE_DEVICES=0 LIMIT=25 timeout 60 python3 .bench/speed.py .bench/old old256 --weights assets/tiny.safetensors --batch 256 >> $OUT/speeds.txt 2>&1
 CUDA_VISIBLE_DEVICES=0 LIMIT=45 timeout 80 python3 .bench/speed.py . new1024 --weights assets/tiny.safetensors --batch 1024 --encode-once 2048 >> $OUT/speeds.txt 2>&1
 CUDA_VISIBLE_DEVICES=0 LIMIT=80 PROFILE=1 timeout 120 python3 .bench/speed.py . new1024c --weights assets/tiny.safetensors --batch 1024 --encode-once 2048 --compile >> $OUT/speeds.txt 2>&1
 CUDA_VISIBLE_DEVICES=0 timeout 60 python3 .bench/vae_speed.py vlm >> $OUT/speeds.txt 2>&1) &
(CUDA_VISIBLE_DEVICES=1 timeout ${T2:-500} python3 .bench/pilot.py $R vae ${T:-430} vaeA --dtype bfloat16 --batch 48 > $OUT/vaeA.txt 2>&1) &
(CUDA_VISIBLE_DEVICES=2 timeout ${T2:-500} python3 .bench/pilot.py $R vae ${T:-430} vaeB --dtype bfloat16 --batch 48 --config /tmp/wide.json > $OUT/vaeB.txt 2>&1) &
(CUDA_VISIBLE_DEVICES=3 timeout ${T2:-500} python3 .bench/pilot.py $R vlm ${T:-430} vlmA --dtype bfloat16 --batch 256 --lr 1.5e-3 > $OUT/vlmA.txt 2>&1) &
wait
for f in vaeA vaeB vlmA; do tr '\r' '\n' < $OUT/$f.txt | grep -v "step/s" > $OUT/x && mv $OUT/x $OUT/$f.txt; done
cat $OUT/vaeA.txt $OUT/vaeB.txt $OUT/vlmA.txt | cut -c1-250 | tail -60
