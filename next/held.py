import sys; sys.path.insert(0,'/tmp/wt/w20')
import torch, vino, collections; torch.set_num_threads(1)
from toy import language
from toy.world import *
from toy.benchmark import score_caption
path, task, n = sys.argv[1], sys.argv[2], int(sys.argv[3]); K=int(sys.argv[4]) if len(sys.argv)>4 else 0; PH=sys.argv[5] if len(sys.argv)>5 else "unknown"
m=vino.Vino.load(path); vlm=m.mm_encoder
used=[]
orig=language.Speaker.expand
def flat(phrase):
    out=""
    for p in phrase:
        out+= p if type(p) is str else "{%s}"%p if type(p) is language.Name else "["+"|".join(flat(x) for x in p.known+p.held)+"]"
    return out
def expand(self, phrase, facts, words, stated):
    for part in phrase:
        if type(part) is language.Choice:
            options=part.known
            if self.all_phrases and part.held and self.random()<0.15:
                options,self.held_out=part.held,True
                c=self.choice(options); self.log.append(flat(c)); orig(self,c,facts,words,stated)
            else: expand(self,self.choice(options),facts,words,stated)
        elif type(part) is language.Name:
            rule=part
            if part in facts: stated.add(str(part)); rule=facts[part]
            if type(rule) is not language.Words and rule in language.GRAMMAR: expand(self,language.GRAMMAR[rule],facts,words,stated)
            else: words.append(rule)
        else: words.append(part)
language.Speaker.expand=expand
def make(seed,k):
    maker=SampleMaker(seed,PH)
    while True:
        maker.log=[]; maker.held_out=False
        s=getattr(maker,METHODS[task])(k,TASKS[task].clip)
        if maker.held_out or PH=="known": return s,maker.log
stat=collections.defaultdict(lambda:[0,0]); bad=0
pairs=[make(f"h {i}",K) for i in range(n)]
ss=[p[0] for p in pairs]
from train import make_stage
world=ToyWorld(make_stage("3",m.config,{}),m.config,"x")
target=torch.zeros(3,9 if TASKS[task].clip else 1,1,1)
ans=[]
for a in range(0,n,100):
    b=world.collate(task,ss[a:a+100],"cpu"); refs=[m.encode(r) for r in b.references]
    ans+=vlm.answer(b.short_prompts,refs,m.config.sampling.rewrite_system)
kinds=collections.defaultdict(lambda:[0,0]); shown=0
for (s,log),a in zip(pairs,ans):
    ok=all(score_caption("r, unknown",s,a,target,None).values())
    bad+=not ok; kinds[s.kind][0]+=not ok; kinds[s.kind][1]+=1
    if not ok and shown<int(sys.argv[6] if len(sys.argv)>6 else 0): shown+=1; print(s.kind,"|",s.short_prompt,"|=>",a,"| TOLD",s.prompt if K or task=="tv2v" else "")
    for l in set(log): stat[l][0]+=not ok; stat[l][1]+=1
print(task,PH,"bad",bad,"/",n,dict(kinds))
for l,(b,c) in sorted(stat.items(), key=lambda x:-x[1][0])[:28]: print(f"{b:3d}/{c:3d}  {l}")
