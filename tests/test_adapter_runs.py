"Training adapters: checkpoints without the base, resumed to the bit, refused on another base; penalties; what the optimiser holds."
from functools import partial
import pytest, torch
from torch import nn
from adapted import create, diff, randomise, run as outputs, wake
from diffnb.core import Denoiser, Feats, preset
from diffnb.data.images import Images, batches, floats
from diffnb.peft.baselines import bitfit, full, houlsby, prefix
from diffnb.peft.core import names, slots, switch
from diffnb.peft.files import base_state, tensors
from diffnb.peft.lora import dora, lora, pissa, timed_lora
from diffnb.peft.trajectory import overlap, rank_penalty, trajectory
from diffnb.process.gaussian import Gaussian
from diffnb.rng import Rng
from diffnb.saving import save
from diffnb.store import load_json, load_tensors
from diffnb.train.checkpoint import load_denoiser, load_weights, still
from diffnb.train.ema import averaged, halflife
from diffnb.train.loop import fit
from diffnb.train.task import DiffusionTask, constant, held_out_loss
from diffnb.weights import learned

WAYS = dict(lora=lora(rank=2), dora=dora(rank=2), pissa=pissa(rank=2), bitfit=bitfit(), houlsby=houlsby(), prefix=prefix(3, 8),
            timed=timed_lora(rank=4, rule=dict(ranks=[1, 2, 4])), trajectory=trajectory(ranks=(1, 2, 4)), full=full())

@pytest.fixture(scope='module')
def images():
    g = torch.Generator().manual_seed(0)
    return Images(torch.randint(0, 256, (24, 3, 8, 8), generator=g, dtype=torch.uint8), torch.arange(24)%3, ('a', 'b', 'c'))

def base(seed=0): return randomise(create('dit_tiny', classes=3, size=8, ch=3), seed)
def task(way, seed=0, process=None, **kw):
    net = base(seed)
    torch.manual_seed(1) # an adapter starts from the same numbers every time
    return DiffusionTask(way(net), process or Gaussian('straight', 'flow'), lr=constant(1e-2), drop=.2, **kw)
def go(images, way, steps, folder=None, made=None, **kw):
    return fit(made or task(way, **kw), partial(batches, images, 6, Rng(0), transforms=(floats,)), steps, folder, averages=dict(ema=halflife(30)), bar=False)
def adapter_keys(o): return {k for k in o if 'adapters' in k.split('.')}
def bits(r):
    out = {f'net/{k}': v for k,v in r.task.net.state_dict().items()} | {f'ema/{k}': v for k,v in r.emas['ema'].avg.items()}
    return out | {f'opt/{i}/{k}': v for i,s in enumerate(r.opt.state.values()) for k,v in s.items()}
def same(a, b): return a.keys()==b.keys() and all(torch.equal(v, b[k]) for k,v in a.items())

@pytest.mark.parametrize('way', WAYS)
def test_ten_are_five_and_five(images, tmp_path, way):
    whole = go(images, WAYS[way], 10)
    go(images, WAYS[way], 5, tmp_path/'r')
    again = go(images, WAYS[way], 10, tmp_path/'r')
    assert same(bits(again), bits(whole))
    assert not same(bits(again), bits(go(images, WAYS[way], 9)))

@pytest.mark.parametrize('way', WAYS)
def test_files_hold_the_adapter_alone(images, tmp_path, way):
    r = go(images, WAYS[way], 2, tmp_path/'r')
    model, ema, moments = (load_tensors(r.saved/f'{k}.safetensors')[0] for k in ('model', 'ema-ema', 'optim'))
    learned_names = {k for k,p in r.task.net.named_parameters() if p.requires_grad}
    assert {k.rsplit(':', 1)[0] for k in moments}==learned_names and set(r.emas['ema'].avg)==learned_names
    if way=='full':
        assert model.keys()==base().state_dict().keys() and not load_json(r.saved/'state.json')['adapted']
    else:
        assert model.keys()==adapter_keys(model)==adapter_keys(r.task.net.state_dict()) and ema.keys()==adapter_keys(ema)
        assert not (r.saved/'config.json').exists() # it is no network
        assert same(base_state(r.task.denoiser), base().state_dict()) # and the base has not moved

@pytest.mark.parametrize('way', WAYS)
def test_weights_come_back_onto_the_base(images, tmp_path, way):
    r = go(images, WAYS[way], 3, tmp_path/'r')
    for average,net in (('ema', averaged(r.task.net, r.emas['ema'])), (None, r.task.net.eval())):
        again = load_denoiser(tmp_path/'r', average, None if way=='full' else base())
        assert same(again.state_dict(), net.state_dict()) and torch.equal(outputs(again), outputs(net))
    assert diff(outputs(net), outputs(base()))>1e-4 # it has learned something

def test_another_base_is_refused(images, tmp_path):
    go(images, WAYS['lora'], 2, tmp_path/'r')
    with pytest.raises(ValueError, match='another base'): go(images, WAYS['lora'], 4, tmp_path/'r', seed=5)
    with pytest.raises(ValueError, match='another base'): load_denoiser(tmp_path/'r', base=base(5))
    with pytest.raises(ValueError, match='give the base.*dit_tiny'): load_denoiser(tmp_path/'r')
    with pytest.raises(ValueError, match='adapters alone'): load_weights(tmp_path/'r', base())
    with pytest.raises(ValueError, match='adapters alone'): go(images, WAYS['full'], 4, tmp_path/'r')
    go(images, WAYS['full'], 2, tmp_path/'f')
    with pytest.raises(ValueError, match='holds a whole network'): go(images, WAYS['lora'], 4, tmp_path/'f')

def test_another_form_is_refused(images, tmp_path):
    go(images, WAYS['lora'], 2, tmp_path/'r')
    with pytest.raises(ValueError, match='shape'): go(images, lora(rank=3), 4, tmp_path/'r')
    with pytest.raises(ValueError, match='missing|unexpected'): go(images, WAYS['dora'], 4, tmp_path/'r')

def test_two_adapters_and_their_weights(images, tmp_path):
    "An older adapter helps, stands still and is kept; averages do not hold it."
    def both(net):
        net = wake(lora(rank=2)(net, 'old'), 'old')
        return switch(trajectory(ranks=(1, 1, 1))(net, 'new'), {'old': .5, 'new': 1.})
    r = go(images, both, 3, tmp_path/'r')
    again = load_denoiser(tmp_path/'r', base=base())
    assert set(names(again))=={'new', 'old'}
    assert torch.equal(outputs(again), outputs(averaged(r.task.net, r.emas['ema'])))
    fresh = task(both).denoiser
    assert same(tensors(again, 'old'), tensors(fresh, 'old')) and not same(tensors(again, 'new'), tensors(fresh, 'new'))
    assert not any('.old.' in k for k in load_tensors(r.saved/'ema-ema.safetensors')[0])

def test_a_base_that_moves_is_kept(images, tmp_path):
    def half(net):
        net = lora(rank=2)(net)
        net.stem.requires_grad_(True)
        return net
    r = go(images, half, 2, tmp_path/'r')
    assert not still(r.task.net) and load_tensors(r.saved/'model.safetensors')[0].keys()==r.task.net.state_dict().keys()
    whole, again = go(images, half, 4), go(images, half, 4, tmp_path/'r')
    assert same(bits(again), bits(whole))

def test_with_a_learned_weighting(images, tmp_path):
    "What is trained beside the denoiser is kept, the base under the adapter is not."
    def weighted(): return task(WAYS['lora'], process=Gaussian('straight', 'flow', weight=learned(dim=8)))
    torch.manual_seed(0); whole = go(images, None, 6, made=weighted())
    torch.manual_seed(0); go(images, None, 3, tmp_path/'r', made=weighted())
    again = go(images, None, 6, tmp_path/'r', made=weighted())
    keys = load_tensors(again.saved/'model.safetensors')[0].keys()
    assert same(bits(again), bits(whole)) and {k.split('.')[0] for k in keys}=={'denoiser', 'weight'}
    assert all('adapters' in k.split('.') for k in keys if k.startswith('denoiser.'))
    back = load_denoiser(tmp_path/'r', base=base())
    assert torch.equal(outputs(back), outputs(averaged(again.task.net, again.emas['ema'])['denoiser']))

class Counted(Denoiser):
    "A network with a buffer that a checkpoint holds."
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.register_buffer('places', torch.arange(4.))
    def features(self, x, net_t, **cond): return Feats(self.lin(x+self.places))
    def head(self, feats): return feats.h
    def demo(self, b=2, seed=0): return torch.zeros(b, 4), torch.ones(1), {}

@preset('denoiser')
def counted(): return Counted()

def test_buffers_of_the_base_stay_out(tmp_path):
    net = create('counted')
    made = DiffusionTask(lora('lin', rank=1)(net), Gaussian('straight', 'flow'), lr=constant(1e-2))
    def data(start=0):
        while True: yield dict(x=torch.ones(2, 4), idx=torch.arange(2))
    r = fit(made, data, 2, tmp_path/'r', bar=False)
    for k in ('model', 'ema-ema'): assert not any('places' in n for n in load_tensors(r.saved/f'{k}.safetensors')[0])
    assert torch.equal(load_denoiser(tmp_path/'r', base=create('counted')).places, torch.arange(4.))

@pytest.mark.parametrize('way', [k for k in WAYS if k!='full'])
def test_memory(images, way):
    "Gradients and moments are those of the adapter: a fraction of the network's."
    def held(r): return sum(v.numel() for s in r.opt.state.values() for v in s.values() if v.ndim)+sum(p.grad.numel() for p in r.task.net.parameters() if p.grad is not None)
    mine, whole = go(images, WAYS[way], 1), go(images, WAYS['full'], 1)
    n = sum(p.numel() for p in mine.task.net.parameters() if p.requires_grad)
    assert held(mine)==3*n and held(whole)==3*sum(p.numel() for p in base().parameters()) and held(mine)<.35*held(whole)

@pytest.mark.parametrize('accumulate', [1, 3])
def test_penalties_are_trained_and_not_measured(images, accumulate):
    "The penalty counts once, however a batch is cut, and moves the adapter alone; a held-out loss is without it."
    def both(net): return .01*rank_penalty(net)+.001*overlap(net)
    def made(penalty): return task(trajectory(ranks=(2, 2, 2), zero=False), penalty=penalty)
    def first(penalty): return fit(made(penalty), partial(batches, images, 6, Rng(0), transforms=(floats,)), 1, bar=False, accumulate=accumulate, clip=None)
    plain, with_it = first(None), first(both)
    fresh = made(None).denoiser
    p = both(fresh)
    assert with_it.last.loss-plain.last.loss==pytest.approx(p.item(), rel=1e-3) and p>0
    p.backward()
    for (k,a),(_,b),(_,c) in zip(plain.task.net.named_parameters(), with_it.task.net.named_parameters(), fresh.named_parameters()):
        if a.requires_grad: assert diff(b.grad-a.grad, 0 if c.grad is None else c.grad)<1e-5, k
        else: assert b.grad is None
    data = list(zip(range(1), batches(images, 6, Rng(0), transforms=(floats,))))
    losses = [held_out_loss(made(o), iter([b for _,b in data]), 1, Rng(0)) for o in (None, both)]
    assert losses[0]==losses[1]

def test_saving_a_network_with_adapters(tmp_path):
    net = lora(rank=2)(base())
    with pytest.raises(ValueError, match='save_adapter.*fuse'): save(net, tmp_path/'n')
    with pytest.raises(ValueError, match='has adapters'): save(trajectory()(base()), tmp_path/'n')
    assert not (tmp_path/'n').exists()

def test_parts_without_a_preset_are_named(images, tmp_path):
    net = lora(rank=2)(base())
    for _,_,s in slots(net): del s['default'].preset
    with pytest.raises(ValueError, match='no preset made'): go(images, None, 1, tmp_path/'r', made=DiffusionTask(net, Gaussian('straight', 'flow')))

def test_the_null_label_and_segments_have_adapters():
    "What is asked without a label goes through the table like the rest."
    net = wake(lora('label.table', rank=2)(base()))
    x,t,cond = net.demo()
    with torch.no_grad(): free, null, off = net(x, t), net(x, t, y=torch.full((len(x),), 3)), switch(net, None)(x, t)
    assert torch.equal(free, null) and diff(free, off)>1e-3
    net = randomise(create('bert_tiny'))
    x,t,cond = net.demo()
    with torch.no_grad():
        was = net(x, t, **cond)
        now = wake(lora('embed.types', rank=1)(net))(x, t, **cond)
    assert diff(was, now)>1e-3
