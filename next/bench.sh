. ${HERE:-/tmp/go}/common.sh
F=$W/stage3/final.safetensors; DEV=${DEV:-cuda}; S=${S:-100}; end=$(cat $W/end); L=$(( end - $(date +%s) - 10 ))
go() { local gpu=$1; shift; (cd $R && CUDA_VISIBLE_DEVICES=$gpu timeout -k 5 $L $PY -m toy.benchmark "$@" --weights $F --samples $S --device $DEV --out $W/bench-$gpu ${STEPS:-} > $W/bench-$gpu.log 2>&1; echo "== bench $gpu rc $? at $(now) s"); }
go 0 phrasings &
go 1 geneval vbench &
go 2 gedit shapes &
go 3 openve rewriter &
wait
(cd $W && tar czf $W/home/bench.tar.gz bench-?/*.md bench-?/*.png bench-?.log 2>/dev/null)
echo "== bench end at $(now) s"
