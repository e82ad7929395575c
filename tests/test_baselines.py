"Full training, biases, bottlenecks, prefixes: the start, the equations, the counts, the files."
import pytest, torch
from torch import nn
from diffnb.models.layers import Attention, attend
from diffnb.peft.baselines import attends, bitfit, flatten, full, houlsby, houlsby_part, offset_part, pfeiffer, pfeiffer_part, prefix, prefix_part
from diffnb.peft.core import coverage, merge, probe, slots, switch, unmerge
from diffnb.peft.files import combine, load_adapter, save_adapter, tensors
from adapted import TINY, create, diff, gen, randomise, run, wake

LOOKS = [n for n in TINY if any(attends(k, m) for k,m in create(n).named_modules())]

@pytest.mark.parametrize('method', [bitfit, houlsby, pfeiffer, lambda: prefix(3, 8)], ids=['bitfit', 'houlsby', 'pfeiffer', 'prefix'])
@pytest.mark.parametrize('name', TINY)
def test_identity_and_off(name, method, request):
    "The base to the bit at the start and when it is off; another output in between; every part called."
    if 'prefix' in request.node.name and name not in LOOKS:
        with pytest.raises(ValueError, match='fits none'): method()(create(name))
        return
    net = randomise(create(name))
    want = run(net)
    net = method()(net)
    assert torch.equal(run(net), want) and probe(net)==len(coverage(net, 'default').adapted)
    assert not torch.equal(run(wake(net)), want)
    assert torch.equal(run(switch(net, None)), want)

def test_most_networks_look(): assert {'dit_tiny', 'diffit_tiny', 'mlm_tiny', 'bert_tiny', 'sd_unet_tiny'}<=set(LOOKS)

def test_full():
    net = full()(create('dit_tiny').requires_grad_(False))
    assert all(p.requires_grad for p in net.parameters()) and not list(slots(net))

def test_biases():
    "As many numbers as there are biases; merged they are in the biases, and those of the base come back."
    net = wake(bitfit()(randomise(create('diffit_tiny'))))
    assert coverage(net, 'default').numbers==sum(p.numel() for k,p in create('diffit_tiny').named_parameters() if k.endswith('bias'))
    want,before = run(net),{k: v.clone() for k,v in net.state_dict().items()}
    merge(net)
    assert diff(run(net), want)<1e-5*max(1., want.abs().max().item())
    changed = {k for k,v in net.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and all(k.endswith('bias') for k in changed)
    assert all(torch.equal(v, before[k]) for k,v in unmerge(net).state_dict().items())

def test_a_bias_beside_a_shared_weight_may_change():
    net = bitfit(['out'])(create('bert_tiny'))
    assert list(coverage(net, 'default').adapted)==['out']

@pytest.mark.parametrize('make,per', [(houlsby, 2), (pfeiffer, 1)])
def test_bottlenecks(make, per):
    d = 64
    net = make()(create('dit_tiny'))
    assert list(coverage(net, 'default').adapted.values())==[2*d*(d//16)+d//16+d]*2*per
    layer,y = nn.Linear(8, 8),torch.randn(3, 8, generator=gen())
    part = houlsby_part(layer, 2)
    with torch.no_grad():
        for p in part.parameters(): p.normal_(generator=gen(2))
        want = y+.5*(nn.functional.silu(y@part.down.T+part.b_down)@part.up.T+part.b_up)
        assert diff(part(y, .5, layer, y, (y,), {}), want)<1e-6
    with pytest.raises(ValueError, match='a bottleneck of 9'): houlsby_part(layer, 9)

def test_a_bottleneck_of_pfeiffer_has_relu():
    layer,y = nn.Linear(8, 8),torch.randn(3, 8, generator=gen())
    part = pfeiffer_part(layer, 2)
    with torch.no_grad():
        for p in part.parameters(): p.normal_(generator=gen(2))
        want = y+.5*((y@part.down.T+part.b_down).relu()@part.up.T+part.b_up)
        assert diff(part(y, .5, layer, y, (y,), {}), want)<1e-6

def test_biases_are_summed():
    "The sum of two is what both do together; a layer without bias takes none when it is merged."
    net = randomise(create('dit_tiny'))
    for i,n in enumerate('ab'): net = wake(bitfit()(net, n), n, i)
    want = run(switch(net, {'a': .7, 'b': -.4}))
    assert diff(run(combine(net, {'a': .7, 'b': -.4}, 'both')), want)<2e-5*max(1., want.abs().max().item())
    layer = nn.Linear(3, 3, bias=False)
    with pytest.raises(ValueError, match='layer without bias'): offset_part(layer).change(layer)

def test_a_flat_prefix_is_trained_as_before():
    for on in (True, False):
        net = prefix(3, 8)(create('dit_tiny'))
        for _,_,s in slots(net): s['default'].requires_grad_(on)
        assert all(p.requires_grad==on for _,_,s in slots(flatten(net)) for p in s['default'].parameters())
    with pytest.raises(ValueError, match='is no adapter of prefixes'): flatten(bitfit()(create('dit_tiny')))

def test_the_first_gradient():
    "Reaches what is zero, in every part: with both ways at zero it would reach the last bias alone."
    for make,wakes in ((houlsby, 'up'), (lambda: prefix(3, 8), 'gate'), (bitfit, 'v')):
        net = make()(randomise(create('dit_tiny')))
        x,t,cond = net.demo()
        net(x, t, **cond).square().mean().backward()
        for _,_,s in slots(net): assert getattr(s['default'], wakes).grad.abs().sum()>0

@pytest.mark.parametrize('name', LOOKS)
def test_flatten(name):
    "The network that made the prefixes goes; the outputs stay."
    net = wake(prefix(3, 8)(randomise(create(name))))
    want = run(net)
    many = coverage(net, 'default').numbers
    assert diff(run(flatten(net)), want)<=1e-6*max(1., want.abs().max().item())
    assert coverage(net, 'default').numbers<many

def test_a_prefix_is_its_equation():
    layer,x,shift = Attention(8, 2),torch.randn(2, 5, 8, generator=gen()),torch.randn(2, 1, 24, generator=gen(1))
    part = prefix_part(layer, 3)
    with torch.no_grad():
        part.gate.copy_(torch.tensor([.3, -.5]))
        y = layer(x, shift)
        q = (layer.qkv(x)+shift)[...,:8]
        o = attend(q, *(v.expand(2, -1, -1) for v in part.source.chunk(2, -1)), 2)
        want = y+torch.cat([.3*torch.ones(4), -.5*torch.ones(4)]).tanh()*o@layer.proj.weight.T
        assert diff(part(y, 1., layer, y, (x, shift), {}), want)<1e-6
        assert diff(part(y, 1., layer, y, (x,), dict(shift=shift)), want)<1e-6

def test_by_sample():
    net = randomise(create('dit_tiny'))
    for i,n in enumerate('ab'): net = wake(prefix(3)(net, n), n, i)
    x,t,cond = net.demo(2)
    with torch.no_grad():
        got = switch(net, ['a', 'b'])(x, t, **cond)
        for i,n in enumerate('ab'): assert diff(switch(net, n)(x[i:i+1], t[i:i+1], y=cond['y'][i:i+1]), got[i:i+1])<1e-5

@pytest.mark.parametrize('method', [bitfit, houlsby, pfeiffer, lambda: prefix(3, 8)], ids=range(4))
def test_files(method, tmp_path):
    net = wake(method()(randomise(create('dit_tiny'))))
    save_adapter(net, tmp_path/'a')
    got = load_adapter(randomise(create('dit_tiny')), tmp_path/'a')
    assert torch.equal(run(got), run(net)) and tensors(got, 'default').keys()==tensors(net, 'default').keys()

def test_what_is_no_change_of_weights():
    for make in (houlsby, lambda: prefix(3)):
        net = make()(create('dit_tiny'))
        with pytest.raises(ValueError, match='is no change of weights'): merge(net)
        with pytest.raises(ValueError, match='is no sum of two'): combine(net, {'default': 1.}, 'new')
