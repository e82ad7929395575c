"Adapters: which layers, exact off, several at once and by sample, merging that can be undone, errors that say what to do."
import copy, re
import pytest, torch
from torch import nn
from diffnb.peft.core import (Between, coverage, find, fuse, hits, inject, inner, merge, names, probe, remove, shared, slots,
                              switch, unmerge)
from diffnb.peft.lora import lora, lora_part, timed_lora
import adapted
from adapted import TINY, create, diff, randomise

def wake(net, name, seed=1): return adapted.wake(net, name, seed, .2)
def run(net, b=3): return adapted.run(net, b)
def two(name='dit_tiny', make=lora, **kw):
    net = randomise(create(name))
    for i,n in enumerate('ab'): net = wake(make(rank=2, **kw)(net, n), n, i)
    return net

def test_patterns():
    assert hits('blocks.10.mlp.0', 'blocks.1?') and hits('blocks.1.mlp.0', 'mlp.*') and hits('blocks.1.mlp.0', '1.mlp')
    assert not hits('blocks.10.mlp', 'blocks.1') and not hits('blocks.1.mlp', 'lp') and not hits('mlp', 'mlp.0')

@pytest.mark.parametrize('target,n', [('qkv', 2), (nn.Embedding, 1), (re.compile(r'blocks\.\d\.mlp\.0'), 2), (lambda k,m: 'out' in k, 1),
                                      (['blocks.0'], 5), (['stem', 'out'], 2)])
def test_targets(target, n): assert len(find(create('dit_tiny'), target))==n

def test_blocks_and_skip():
    net = create('dit_tiny')
    assert set(find(net, nn.Linear, blocks=[1], skip='ada'))=={f'blocks.1.{o}' for o in ('attn.qkv', 'attn.proj', 'mlp.0', 'mlp.2')}

@pytest.mark.parametrize('kw,words', [(dict(targets='qvk'), "did you mean 'qkv'"), (dict(targets=['qkv', 'blocks.7']), "'blocks.7' fits none"),
    (dict(targets=re.compile('nothing')), 'fits none'), (dict(targets=nn.Conv1d), 'fits none'), (dict(targets='qkv', skip='nobody'), "'nobody' fits none"),
    (dict(targets='qkv', skip='attn'), 'nothing is left'), (dict(targets='qkv', blocks=[9]), 'nothing is left')])
def test_a_target_without_layers(kw, words):
    with pytest.raises(ValueError, match=re.escape(words)): find(create('dit_tiny'), **kw)

@pytest.mark.parametrize('name', TINY)
def test_off_on_off(name):
    "On every network: the start is the base to the bit, a trained one is not, off is the base again, and every part is called."
    base = randomise(create(name))
    want,keys = run(base),set(base.state_dict())
    net = lora(rank=1)(base)
    assert torch.equal(run(net), want)
    assert probe(net)==coverage(net, 'default').adapted.__len__()>0
    wake(net, 'default')
    assert not torch.equal(run(net), want)
    assert torch.equal(run(switch(net, None)), want)
    assert set(remove(net, 'default').state_dict())==keys and torch.equal(run(net), want)

def test_only_the_adapter_is_trained():
    "Gradients at all of the adapter and nowhere else, and the count is that of the report."
    net = two()
    assert {k for k,p in net.named_parameters() if p.requires_grad}=={k for k,_ in net.named_parameters() if '.adapters.b.' in k}
    x,t,cond = net.demo()
    net(x, t, **cond).square().mean().backward()
    assert all((p.grad is not None and p.grad.abs().sum()>0)==p.requires_grad for p in net.parameters())
    assert sum(p.numel() for p in net.parameters() if p.requires_grad)==coverage(net, 'b').numbers

def test_switching():
    net = two()
    a = run(switch(net, 'a'))
    b = run(switch(net, 'b'))
    assert torch.equal(run(switch(net, 'a')), a) and diff(a, b)>1e-3
    half = run(switch(net, {'a': .5}))
    assert not torch.equal(half, a)
    assert torch.equal(run(switch(net, {'a': 1.})), a)

@pytest.mark.parametrize('name', ['dit_tiny', 'diffit_tiny', 'mlm_tiny', 'mamba2_tiny', 'sd_unet_tiny'])
def test_by_sample(name):
    "Each sample has its own adapter, or none: as if alone. Two sums in other orders: 1e-5 of values around 1."
    net,use = two(name),['a', None, 'b', 'a']
    x,t,cond = net.demo(4)
    with torch.no_grad():
        got = switch(net, use)(x, t, **cond)
        for i,o in enumerate(use):
            def some(v): return v[i:i+1] if torch.is_tensor(v) and len(v)==4 else v
            alone = switch(net, o)(x[i:i+1], some(t), **{k: some(v) for k,v in cond.items()})
            keep = cond['mask'][i] if 'mask' in cond else slice(None)
            assert diff(got[i:i+1][:,keep], alone[:,keep])<1e-5*max(1, alone.abs().max().item())

def test_by_sample_with_one_time_for_all():
    "A time that all samples share is repeated where adapters differ."
    net = two(targets=['qkv', 'ada'])
    x,t,cond = net.demo(2)
    with torch.no_grad(): got = switch(net, ['a', 'b'])(x, t[:1], **cond)
    with torch.no_grad(): b = switch(net, 'b')(x[1:], t[:1], y=cond['y'][1:])
    assert diff(got[1:], b)<1e-5

def test_a_batch_of_another_size():
    net = switch(two(), ['a', 'b'])
    with pytest.raises(ValueError, match='2 samples have adapters of their own'): run(net, 3)

@pytest.mark.parametrize('dtype,tol', [(torch.float32, 2e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize('name', ['dit_tiny', 'diffit_tiny', 'bert_tiny', 'mamba2_tiny'])
def test_merge(name, dtype, tol):
    "Merged as unmerged, to the rounding of the weights through a few layers; unmerged, the bytes of the base."
    net = two(name).to(dtype)
    x,t,cond = net.demo()
    x = x.to(dtype) if x.is_floating_point() else x
    before = {k: v.clone() for k,v in net.state_dict().items()}
    with torch.no_grad():
        want = switch(net, {'a': .7, 'b': -.4})(x, t, **cond)
        err = merge(net)
        assert 0<err<1e-6 if dtype==torch.float32 else err==0 # half a unit in the last place
        assert diff(net(x, t, **cond), want)<tol*max(1., want.abs().max().item())*4
        assert any(not torch.equal(before[k], v) for k,v in net.state_dict().items())
        unmerge(net)
    assert all(torch.equal(before[k], v) for k,v in net.state_dict().items())

def test_merging_twice_and_in_wrong_order():
    net = switch(two(), 'a')
    merge(net)
    for f in (lambda: merge(net), lambda: switch(net, 'b'), lambda: remove(net, 'a')):
        with pytest.raises(ValueError, match='unmerge first'): f()
    unmerge(net)
    with pytest.raises(ValueError, match='by sample'): merge(switch(net, ['a', 'b']))

def test_a_failed_merge_changes_nothing():
    net = timed_lora(rank=2, rule=dict(ranks=[1, 2, 2]))(create('dit_tiny'))
    before = {k: v.clone() for k,v in net.state_dict().items()}
    with pytest.raises(ValueError, match='depends on the time'): merge(net)
    assert all(torch.equal(before[k], v) for k,v in net.state_dict().items())

def test_quantised_weights_are_refused():
    net = lora(targets='blocks.0.attn.qkv', rank=2)(create('dit_tiny'))
    layer = net.blocks[0].attn.qkv
    layer.weight = nn.Parameter(layer.weight.data.mul(100).to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match='dequantise'): merge(net)

def test_fuse():
    "A plain network: the keys of its preset, the outputs of the adapter."
    net = switch(two(), 'a')
    want = run(net)
    plain = fuse(net)
    assert plain.state_dict().keys()==create('dit_tiny').state_dict().keys() and diff(run(plain), want)<1e-5
    assert not any(m._forward_hooks for m in plain.modules())

def test_shared_weights():
    assert shared(create('bert_tiny'))
    for k in ('out', 'embed.tokens'):
        with pytest.raises(ValueError, match='shares its weight with'): lora([f'{k}'], rank=2)(create('mlm_tiny'))
    lora('out', rank=2)(create('mlm_tiny', tied=False)) # of its own

def test_names():
    net = lora(rank=2)(create('dit_tiny'), 'one')
    for bad in ('a.b', 'keys', 'kept', 'by_rows', ''):
        with pytest.raises(ValueError, match='cannot name an adapter'): lora(rank=2)(net, bad)
    with pytest.raises(ValueError, match="there is an adapter 'one'"): lora(rank=2)(net, 'one')
    with pytest.raises(ValueError, match="did you mean 'one'"): switch(net, 'on')
    with pytest.raises(ValueError, match="no adapter is called 'one'"): switch(create('dit_tiny'), 'one')
    with pytest.raises(ValueError, match='no adapter'): remove(net, 'two')
    assert names(net)==['one']

def test_probe_finds_what_is_stepped_around():
    "The router of the experts reads its weight by itself: a part behind it would learn nothing."
    with pytest.raises(ValueError, match='2 of 2 parts are not called'): probe(lora('router.gate', rank=2)(create('dit_moe_tiny')))

def test_copies_are_independent():
    net = two()
    other = copy.deepcopy(net)
    want = run(switch(net, 'a'))
    for _,_,s in slots(other): s['a'].B.data.zero_()
    assert torch.equal(run(switch(net, 'a')), want) and not torch.equal(run(switch(other, 'a')), want)
    other = remove(remove(other, 'a'), 'b')
    assert not any(m._forward_hooks for m in other.modules()) and all(m._forward_hooks for _,m,_ in slots(net))

def test_a_timed_copy_reads_its_own_clock():
    net = timed_lora(rank=2, rule=dict(ranks=[1, 2, 2]))(create('dit_tiny'))
    other = copy.deepcopy(net)
    assert isinstance(other, Between) and all(s['default'].clock is other.clock is not net.clock for k,_,s in slots(other) if k)

def test_wrapper_is_the_network():
    "What the network knows, the wrapper knows; it has no preset, so that nobody saves it as if it were plain."
    net = timed_lora(rank=2, rule=dict(ranks=[1, 2, 2]))(create('mlm_tiny'))
    assert net.mask_id==inner(net).mask_id and not hasattr(net, 'preset') and not net.time_free
    assert type(remove(net, 'default')).__name__=='MLM'

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    "The base in half precision, the adapter in float32; the output has the base's dtype."
    net = lora(rank=2)(create('dit_tiny').to(dtype))
    x,t,cond = net.demo()
    y = net(x.to(dtype), t, **cond)
    assert y.dtype==dtype and all(p.dtype==torch.float32 for p in net.parameters() if p.requires_grad)
    y.float().square().mean().backward()
    assert merge(net)<1e-2

def test_autocast():
    net = wake(lora(rank=2)(randomise(create('dit_tiny'))), 'default')
    want = run(net)
    with torch.autocast('cpu', torch.bfloat16): got = run(net)
    assert diff(got.float(), want)<.1*want.abs().max().item()

def test_rest_stays_frozen_and_old_adapters_too():
    net = inject(lora(rank=2)(create('dit_tiny'), 'a'), 'b', {'out': lora_part(create('dit_tiny').out, 2)}, train=False)
    assert not any(p.requires_grad for p in net.parameters())
