# parts.sh: two VAEs and two VLMs (D as configured, E larger), one GPU each. RESUME= or RESUME=--resume, KILL seconds, SPAN seconds of the whole run
. .bench/go/common.sh
SPAN=${SPAN:-720}; KILL=${KILL:-560}; RESUME=${RESUME:-}
X="--dtype=$DT $RESUME"
$PY - <<'P'
import json
c = json.load(open("/tmp/root/tiny_config.json"))
c["text"].update(hidden_size=160, intermediate_size=400, num_hidden_layers=8)
c["vision"].update(depth=5, hidden_size=128, intermediate_size=320, num_heads=4, out_hidden_size=160)
json.dump(c, open("/tmp/large.json", "w"))
P
one 0 vaeD $KILL $SPAN 0.65 pretrain --part=vae --weights=random --out=$W/D --batch=${B0:-12} $X &
one 1 vaeE $KILL $SPAN 0.65 pretrain --part=vae --weights=random --out=$W/E --batch=${B1:-24} $X &
one 2 vlmD $KILL $SPAN 0.65 pretrain --part=vlm --weights=random --out=$W/D --batch=${B2:-256} $X &
one 3 vlmE $KILL $SPAN 0.65 pretrain --part=vlm --weights=random --config=/tmp/large.json --out=$W/E --batch=${B2:-256} $X &
wait
for f in vaeD vaeE vlmD vlmE; do tr '\r' '\n' < $W/$f.log | grep "step/s" | tail -1 | cut -c1-200; tidy $f; done
echo "== parts end at $(now) s"
