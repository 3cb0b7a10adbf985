import sys; sys.path.insert(0,'/tmp/wt/w20')
import torch, vino
from toy.world import *
from toy.benchmark import *
from toy.benchmark import score_caption
path=sys.argv[1]; n=int(sys.argv[2]); groups=sys.argv[3:]
m=vino.Vino.load(path); vlm=m.mm_encoder
world=ToyWorld(make_stage("3",m.config,{}),m.config,"x")
L={"images":("t2i",0),"clips":("t2v",0),"edit":("ti2i",1),"tv2v":("tv2v",0),"tiv2v":("tiv2v",1),"ref":("ti2i_ref",2)}
for g in groups:
    task,k=L[g]
    for ph in ("known","unknown"):
        ss=[s for s in (make_sample(f"f {i}",task,k,ph) for i in range(2*n)) if s.prompt!=s.short_prompt or k][:n]
        b=world.collate(task,ss,"cpu")
        refs=[m.encode(r) for r in b.references]
        ans=vlm.answer(b.short_prompts,refs,m.config.sampling.rewrite_system)
        bad=0
        kinds={}
        for s,a,t in zip(ss,ans,b.target):
            r=score_caption("r, "+ph,s,a,t,None); ok=all(bool(v) for v in r.values())
            kinds.setdefault(s.kind,[0,0]); kinds[s.kind][0]+=not ok; kinds[s.kind][1]+=1
            if not ok:
                bad+=1
                if bad<=8: print(g,ph,"|",s.kind,"|",s.short_prompt,"|=>",a,"| TOLD", s.prompt if k or task in("tv2v",) else "")
        print("==",g,ph,bad,"/",len(ss),kinds)
