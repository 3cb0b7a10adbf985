"""remap.py ROOT WEIGHTS OUT: weights under today's tokenizer. Words that the old one knew keep their embedding; new
words start with random ones, of the old ones' size."""
import sys
root, source, out = sys.argv[1:]; sys.path.insert(0, root)
import torch, vino
from toy.language import toy_tokenizer
torch.manual_seed(0)
m = vino.Vino.load(source)
old, new = m.mm_encoder.tokenizer.get_vocab(), toy_tokenizer().get_vocab()
names = [n for n, _ in m.named_parameters() if n.endswith(("embed_tokens.weight", "lm_head.weight"))]
print(names, len(old), "old,", len(new), "new,", len([w for w in new if w not in old]), "unknown to the old one")
with torch.no_grad():
    for n in names:
        p = m.get_parameter(n); rows = p.clone()
        p.copy_(torch.randn_like(p) * rows[: len(old)].std())
        for word, i in new.items():
            if word in old: p[i] = rows[old[word]]
m.mm_encoder.tokenizer = toy_tokenizer()
m.half().save(out)
