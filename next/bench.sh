. ${HERE:-/tmp/go}/common.sh
F=$W/stage3/final.safetensors; S=${S:-100}; end=$(cat $W/end); L=$(( end - $(date +%s) - 8 )); RB=${RB:-/tmp/rootB}
$PY - $F $W/bench.safetensors <<'P'
import sys, json
from safetensors import safe_open
from safetensors.torch import save_file, load_file
src, dst = sys.argv[1:]
with safe_open(src, "pt") as f: meta = f.metadata()
c = json.loads(meta["config"]); c["sampling"].pop("rewrite_prefix", None); meta["config"] = json.dumps(c)
save_file(load_file(src), dst, meta)
P
go() { local gpu=$1 id=$2; shift 2; (cd $RB && CUDA_VISIBLE_DEVICES=$gpu timeout -k 3 $L $PY -m toy.benchmark "$@" --weights $W/bench.safetensors --samples $S --out $W/bench-$id ${STEPS:-} > $W/bench-$id.log 2>&1; echo "== bench $id $* rc $? at $(now) s"); }
go 0 0 phrasings &
go 1 1 geneval &
go 2 2 gedit &
go 3 3 openve &
go 1 4 vbench shapes &
go 2 5 opens2v &
go 3 6 rewriter &
go 0 7 understanding instructions autoencoder &
wait
(cd $W && tar czf $W/home/bench.tar.gz bench-?/*.md bench-?.log 2>/dev/null)
echo "== bench end at $(now) s"
