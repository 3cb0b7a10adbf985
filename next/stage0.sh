set -u
export PYTHONUNBUFFERED=1 OUT
for w in .bench/whl/*.whl; do python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site $w; done
export PYTHONPATH=/tmp/site
mkdir -p /tmp/runs; cp -r .bench/pilot /tmp/pilot; R=/tmp/pilot; T=${T:-530}; T2=${T2:-575}
(CUDA_VISIBLE_DEVICES=0 timeout $T2 python3 .bench/pilot.py $R vae $T vaeA --dtype bfloat16 --batch 48 > $OUT/vaeA.txt 2>&1) &
(CUDA_VISIBLE_DEVICES=1 EDGE=4 timeout $T2 python3 .bench/pilot.py $R vae $T vaeB --dtype bfloat16 --batch 48 > $OUT/vaeB.txt 2>&1) &
(CUDA_VISIBLE_DEVICES=2 timeout $T2 python3 .bench/pilot.py $R vlm $T vlmA --dtype bfloat16 --batch 96 --lr 1.5e-3 > $OUT/vlmA.txt 2>&1) &
(CUDA_VISIBLE_DEVICES=3 timeout $T2 python3 .bench/pilot.py $R vlm $T vlmB --dtype bfloat16 --batch 256 --lr 2e-3 > $OUT/vlmB.txt 2>&1) &
wait
for f in vaeA vaeB vlmA vlmB; do tr '\r' '\n' < $OUT/$f.txt | grep -v "step/s" > $OUT/x; mv $OUT/x $OUT/$f.txt; done
cat $OUT/*.txt | cut -c1-250 | tail -80
