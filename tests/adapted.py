"What the tests of adapters share: the same small networks every time, and adapters that do something."
import torch
from diffnb import core
from diffnb.core import presets
from diffnb.peft.core import slots

TINY = [n for n in presets('denoiser') if n.endswith('_tiny')]
def create(name, **kw): torch.manual_seed(0); return core.create(name, **kw) # the same network every time
def gen(seed=0): return torch.Generator().manual_seed(seed)
def diff(a, b): return (a-b).abs().max().item()
def randomise(net, seed=0, std=.1):
    g = gen(seed)
    for k,p in net.named_parameters():
        if 'adapters' not in k.split('.'): p.data = p.data+std*torch.randn(p.shape, generator=g).to(p)
    return net.eval()
def wake(net, name='default', seed=1, std=.1):
    "An adapter that does something."
    g = gen(seed)
    for _,_,s in slots(net):
        if name in s:
            for p in s[name].parameters(): p.data = p.data+std*torch.randn(p.shape, generator=g).to(p)
    return net
@torch.no_grad()
def run(net, b=2):
    x,t,cond = net.demo(b)
    return net(x, t, **cond)
