# bench.sh: the benchmarks of the finished weights, four suites at a time; one tar comes home
. .bench/go/common.sh
F=${F:-$W/stage3/final.safetensors}; D=${D:-cuda}; S=${S:-100}; L=${L:-110}
go() { local gpu=$1; shift; (cd $R && CUDA_VISIBLE_DEVICES=$gpu timeout -k 5 $L $PY -m toy.benchmark "$@" --weights $F --samples $S --device $D --out $W/bench-$gpu ${STEPS:-} > $W/bench-$gpu.log 2>&1; echo "== bench $gpu rc $? at $(now) s"); }
go 0 phrasings rewriter &
go 1 geneval vbench understanding instructions &
go 2 gedit shapes autoencoder &
go 3 openve opens2v &
wait
for k in 0 1 2 3; do tr '\r' '\n' < $W/bench-$k.log | grep "^|\|Error\|error" | cut -c1-150; done
(cd $W && tar czf $OUT/bench.tar.gz bench-?/*.md bench-?/*.png bench-?.log)
echo "== bench end at $(now) s"
