export PYTHONUNBUFFERED=1 TRANSFORMERS_VERBOSITY=error
( CUDA_VISIBLE_DEVICES=0 timeout 150 python3 -W ignore .bench/one.py new compiled > $OUT/new.log 2>&1 ) &
A=$!
( CUDA_VISIBLE_DEVICES=1 timeout 150 python3 -m pytest -q -p no:cacheprovider --tb=short test_vino.py -k "averages or gradients or bit or every_stage or bfloat16" 2>&1 | tail -8 ) > $OUT/tests.log 2>&1 &
B=$!
wait $A $B
cat $OUT/new.log; tail -6 $OUT/tests.log
