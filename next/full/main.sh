# One call on four GPUs. Logs to $OUT.
. .bench/common.sh
mkdir -p /tmp/code/.bench /tmp/data; cp -r assets tiny_config.json .bench/new/* /tmp/code/; cp .bench/*.py /tmp/code/.bench/
echo '{}' > full.json; echo '{}' > /tmp/code/full.json
for w in .bench/whl/*.whl; do python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site $w; done
export PYTHONPATH=/tmp/site
nvidia-smi --query-gpu=index,name,memory.total --format=csv,noheader | tee $OUT/machine.log
MEM=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | head -1)
( CUDA_VISIBLE_DEVICES=0 $PY -c "
import torch, transformers, imageio, av, PIL, sys
from transformers import Qwen3VLForConditionalGeneration
print(sys.version.split()[0], torch.__version__, torch.version.cuda, transformers.__version__, imageio.__version__, av.__version__, PIL.__version__, torch.backends.cudnn.version(), torch.cuda.nccl.version())" ) 2>&1 | tee -a $OUT/machine.log
grep MemTotal /proc/meminfo; nproc
nvidia-smi --query-gpu=index,memory.used,power.draw,clocks.sm --format=csv,noheader,nounits -l 1 > $OUT/smi.csv & SMI=$!
( cd /tmp/code; timeout 120 $PY .bench/data.py /tmp/data $TINY ) > $OUT/data.log 2>&1 & DATA=$!
echo "set up after $(( $(date +%s) - T0 )) s"
SAMPLE="--weights random --config $FULL --profile --overwrite"
CLIP="--frames 85 --height 480 --width 848"; EDIT=""
[ -n "$TINY" ] && CLIP="--frames 9 --steps 3" && EDIT="--steps 3"
gpu0() {
  export CUDA_VISIBLE_DEVICES=0 NAME=stage1
  cd /tmp/code
  clock clip 400 $PY sample.py $SAMPLE --prompt "$PROMPT" $CLIP --compile --out clip.mp4
  [ "$MEM" -gt 100000 ] && { wait_data; stage1; }
  clock image $(left) $PY sample.py $SAMPLE $EDIT --prompt "$PROMPT" --compile --out image.png
}
stage1() { DEADLINE=$(( T0 + ${LIMIT:-560} - 45 )) NAME=stage1 clock stage1 $(left) $PY .bench/tr.py /tmp/data one:24 -- --stage 1 --weights random --config $FULL --data /tmp/data/one.jsonl --out /tmp/run1 --compile --validate-every 0 --save-every 1000000; }
wait_data() { while [ -d /proc/$DATA ] && ! grep -q written $OUT/data.log; do sleep 1; done; }
gpu1() {
  export CUDA_VISIBLE_DEVICES=1
  cd /tmp/code
  OFF=/tmp/code
  clock offload-test 90 $PY -m pytest -q -p no:cacheprovider --tb=short test_vino.py -k "offloaded_weights or bfloat16_on_a_gpu" 2>&1 | tail -15
  [ ${PIPESTATUS[0]} = 0 ] || { echo "OLD offload is used"; OFF=/tmp/old; cp -r /tmp/code $OFF; cp $HOME0/.bench/base/vino.py $OFF/; }
  ( cd $OFF; clock clip-offload 440 $PY sample.py $SAMPLE --prompt "$PROMPT" $CLIP --compile --offload --out /tmp/clipo.mp4 )
  $PY -c "import imageio.v3 as i; a, b = (i.imread(p, plugin='pyav') for p in ('/tmp/code/clip.mp4', '/tmp/clipo.mp4')); print('== same frames:', (a == b).all(), abs(a.astype(int) - b).mean())"
  wait_data
  clock edit $(left) $PY sample.py $SAMPLE $EDIT --prompt "make the circle green" --image /tmp/data/p0.png --compile --out edit.png
  clock vae $(left) $PY .bench/one.py new vae $TINYONE
}
HOME0=$PWD
training() {  # GPUs, processes, how, parts...
  export CUDA_VISIBLE_DEVICES=$1; local n=$2 how=$3; shift 3
  cd ${CODEDIR:-/tmp/code}; wait_data
  export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
  NAME=$how-$n DEADLINE=$(( T0 + ${LIMIT:-560} - 40 )) clock train-$how-$n $(left) ${RUN:-torchrun} --nproc-per-node $n --master-port ${PORT:-29513} .bench/tr.py /tmp/data "$@" -- --stage 3 --weights random --config $FULL --data /tmp/data/edit.jsonl --out ${RUNDIR:-/tmp/run-$how} --shard $how --compile --ema-on-host --validate-every 0 --save-every 1000000
}
if [ "$MODE" = second ]; then
  ( export CUDA_VISIBLE_DEVICES=0; cd /tmp/code; clock micro 200 $PY .bench/micro.py ) > $OUT/gpu0.log 2>&1 & A=$!
  ( export CUDA_VISIBLE_DEVICES=1; cd /tmp/code; wait_data; LIMIT=200 stage1 ) > $OUT/gpu1.log 2>&1 & B=$!
  training 2,3 2 fsdp ${PARTS:-c33:8:p c85:6:p} > $OUT/train.log 2>&1 & C=$!
  wait $A $B
  ( export CUDA_VISIBLE_DEVICES=0,1; cd /tmp/code; clock two $(( $(left) - 20 )) ${RUN:-torchrun} --nproc-per-node 2 --master-port 29514 .bench/two.py ) > $OUT/two.log 2>&1 & A=$!
elif [ "$MODE" = fourth ]; then  # two GPUs: training only; SHARD fsdp or zero2
  training 0,1 2 ${SHARD:-fsdp} ${PARTS:-c33:6:p c85:4:p} > $OUT/train.log 2>&1 & A=$!
elif [ "$MODE" = fifth ]; then  # two H200s train; offloaded and resident clip beside it. Four H100s: training first
  offloaded() { ( export CUDA_VISIBLE_DEVICES=$1; cd /tmp/code; clock clip-offload $(( $(left) - 5 )) $PY sample.py $SAMPLE --prompt "$PROMPT" $CLIP --compile --offload --out clipo.mp4 ) > $OUT/gpu0.log 2>&1; }
  resident() { ( export CUDA_VISIBLE_DEVICES=$1; cd /tmp/code; clock clip $(( $(left) - 5 )) $PY sample.py $SAMPLE --prompt "$PROMPT" $CLIP --compile --out clip.mp4; wait_data; stage1 ) > $OUT/gpu1.log 2>&1; }
  if [ "${MEM:-0}" -gt 100000 ]; then
    [ -n "$NOSAMPLE" ] || { offloaded 0 & A=$!; resident 1 & B=$!; }
    training 2,3 2 fsdp ${PARTS:-edit:5:p c33:8:p c85:6:p} > $OUT/train.log 2>&1 & C=$!
  else
    LIMIT=${TRAINLIMIT:-300} training 0,1,2,3 4 fsdp ${PARTS:-c33:6:p c85:4:p} > $OUT/train.log 2>&1
    [ -n "$NOSAMPLE" ] || { offloaded 0 & A=$!; resident 1 & B=$!; }
  fi
  wait $A $B $C
  $PY -c "import imageio.v3 as i; a, b = (i.imread('/tmp/code/' + p, plugin='pyav') for p in ('clip.mp4', 'clipo.mp4')); print('== same frames:', (a == b).all(), abs(a.astype(int) - b).mean())" > $OUT/two.log 2>&1
elif [ "$MODE" = third ]; then  # two ways of attention, each on two GPUs: flash only; cuDNN for long sequences
  cp -r /tmp/code /tmp/codeB; cp .bench/newB/vino.py /tmp/codeB/
  training 2,3 2 fsdp ${PARTS:-c33:5:p c85:5:p} > $OUT/train.log 2>&1 & A=$!
  ( CODEDIR=/tmp/codeB PORT=29515 RUNDIR=/tmp/run-B training 0,1 2 fsdp ${PARTS:-c33:5:p c85:5:p} ) > $OUT/trainB.log 2>&1 & B=$!
else
  gpu0 > $OUT/gpu0.log 2>&1 & A=$!
  gpu1 > $OUT/gpu1.log 2>&1 & B=$!
  if [ "$MEM" -gt 100000 ]; then
    training 2,3 2 fsdp edit:12:p c33:8:p c85:6:p > $OUT/train.log 2>&1 & C=$!
  else
    ( export CUDA_VISIBLE_DEVICES=2; cd /tmp/code; wait_data; stage1 ) > $OUT/train.log 2>&1 & C=$!
  fi
fi
wait $A $B $C
kill $SMI
for f in gpu0 gpu1 two train trainB; do [ -f $OUT/$f.log ] || continue; echo "--- $f"; grep -v "denoising\|it/s\|FutureWarning" $OUT/$f.log | grep "==\|micro\|two\|vae \|RESULT\|peak\|offload\|MMDiT\|VAE\|model\|tower\|all else\|breakdown\|profiled\|FAILED\|rror" | cut -c1-170 | tail -60; done
echo "all after $(( $(date +%s) - T0 )) s"
