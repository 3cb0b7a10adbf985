"""texp.py ROOT NAME SECONDS BATCH LR: text-only captions, from scratch, one core."""
import sys, time, json, os
root, name, seconds, batch, lr = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5])
sys.path.insert(0,root)
import torch; torch.set_num_threads(1)
import dataclasses, shutil
from pathlib import Path
import train
from toy import pretrain
pretrain.PARTS["vlm"]=dataclasses.replace(pretrain.PARTS["vlm"],mixture={"t2i":.5,"t2v":.5})
args=pretrain.parse_arguments(["--part=vlm","--validate-every=0","--steps=1000000",f"--batch={batch}",f"--lr={lr}","--dtype=float32"])
out=Path(f"/tmp/plan/texp-{name}"); shutil.rmtree(out,ignore_errors=True)
run=pretrain.prepare(args,"vlm",None,out)
run.objective.system=lambda task,key: run.vino.config.sampling.rewrite_system
cpu0=time.process_time(); n=0; acc=[]
run.source.collate0=run.source.collate
import toy.world as world
def collate(task, samples, device):
    clip=world.TASKS[task].clip
    answers=[world.describe(s.target,clip,ordered=True) for s in samples]
    return train.Batch(task,[s.prompt for s in samples],[s.short_prompt for s in samples],[],torch.zeros(batch,1),answers)
while True:
    t=time.process_time()-cpu0
    if t>seconds: break
    n+=1
    task,b=run.load(n); run.drawn[task]+=run.step_size
    bt=collate(task,list(b.values())[0],run.device); bt.key=(0,n,0)
    l=run.model(bt).mean(); l.backward(); run.clip_gradients()
    run.optimizer.param_groups[0]["lr"]=lr*min(1,n/100,(1-t/seconds)/0.65)
    run.optimizer.step(); run.optimizer.zero_grad()
    acc.append(l.item())
    if n%100==0: print(f"{name} step {n} samples {n*batch} t {t:.0f} loss {sum(acc[-100:])/100:.4f}",flush=True)
run.vino.save(f"/tmp/plan/texp-{name}.safetensors")
print("end",n*batch)
