"LoRA and its variants: parity with peft both ways, its equations, its files, and one clear error for each mistake."
import json, random
import pytest, torch
from torch import nn
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from diffnb.peft.core import coverage, merge, probe, slots, switch, unmerge
from diffnb.peft.files import combine, load_adapter, save_adapter, swap, tensors
from diffnb.peft.formats import load_diffusers, load_kohya, load_peft, save_diffusers, save_kohya, save_peft
from diffnb.peft.lora import (by_block, closest, diffit_lora, dora, falling, lora, lora_part, phases, pissa, principal, begun, rslora,
                              timed_lora)
from adapted import TINY, create, diff, gen, randomise, run, wake

# --- the start
@pytest.mark.parametrize('method', [lora, rslora, dora, diffit_lora, lambda: timed_lora(rank=8, rule=dict(ranks=[2, 4, 8])), pissa], ids=range(6))
@pytest.mark.parametrize('name', TINY)
def test_identity_at_the_start(name, method):
    "To the bit; PiSSA, which starts with a difference of two equal products, to 1e-6 of the output's size."
    if method is diffit_lora and 'diffit' not in name: name = 'diffit_tiny' # a table of its stages, for all its layers
    base = randomise(create(name))
    want = run(base)
    net = method()(base)
    if name=='dit_moe_tiny' and any(k=='' for k,_,_ in slots(net)): # experts see tokens of all samples: leave them out
        with pytest.raises(ValueError, match='2 times, and a layer works on'): run(net)
        return
    got = run(net)
    assert diff(got, want)<=1e-6*want.abs().max().item()*3 if method is pissa else torch.equal(got, want)

# --- equations
@pytest.mark.parametrize('make,s', [(lora, 2.), (rslora, 8.)])
def test_scales(make, s):
    "r = 16, alpha = 32."
    net = make('blocks.0.attn.qkv', rank=16, alpha=32)(create('dit_tiny'))
    assert [p['default'].scale for _,_,p in slots(net)]==[s]

LAYERS = [(nn.Linear(9, 7), (2, 3, 9)), (nn.Linear(9, 7, bias=False), (5, 9)), (nn.Conv2d(6, 8, 3, 2, 1, dilation=2), (2, 6, 9, 9)),
          (nn.Conv1d(6, 8, 3, padding=1), (2, 6, 9)), (nn.Conv1d(6, 6, 4, groups=6), (2, 6, 9)), (nn.Conv2d(4, 4, 3, padding=1, padding_mode='circular'), (2, 4, 6, 6))]
@pytest.mark.parametrize('i', range(len(LAYERS)))
@pytest.mark.parametrize('lengths', [False, True])
def test_forward_is_the_changed_layer(i, lengths):
    layer,shape = LAYERS[i]
    layer = nn.Module.double(layer)
    part = wake_part(lora_part(layer, 3, .7, lengths=lengths))
    x = torch.randn(shape, generator=gen(), dtype=torch.float64)
    with torch.no_grad():
        y = layer(x)
        got = part(y.clone(), .5, layer, y, (x,), {})
        old = layer.weight.clone()
        layer.weight += .5*part.change(layer)['weight']
        assert diff(got, layer(x))<1e-12
        layer.weight.copy_(old)
def wake_part(part):
    for p in part.parameters(): p.data = p.data+torch.randn(p.shape, generator=gen(3), dtype=p.dtype)*.3
    return part

def test_embedding():
    layer = nn.Embedding(11, 6)
    part = lora_part(layer, 2, .5)
    x = torch.arange(10).view(2, 5)
    y = layer(x).detach()
    assert torch.equal(part(y.clone(), 1., layer, y, (x,), {}), y) and part.B.abs().sum()>0
    wake_part(part)
    assert diff(part(y.clone(), 1., layer, y, (x,), {}), (layer.weight+part.change(layer)['weight'])[x])<1e-6

def test_gradients():
    "Of both factors and the lengths, against differences."
    layer = nn.Linear(4, 3).double()
    x = torch.randn(2, 4, generator=gen(), dtype=torch.float64)
    y = layer(x).detach()
    part = wake_part(lora_part(layer, 2, .7))
    def f(A, B): return torch.func.functional_call(part, dict(A=A, B=B), (y.clone(), 1., layer, y, (x,), {}))
    assert torch.autograd.gradcheck(f, (part.A, part.B))

def test_dora_and_pissa():
    layer = nn.Linear(40, 30)
    part = wake_part(lora_part(layer, 4, 2., lengths=True))
    assert diff((layer.weight+part.change(layer)['weight']).norm(dim=1), part.m.abs())<2e-6*part.m.abs().max().item()*3
    part = begun(lora_part(layer, 4, 2., centred=True), layer, principal(4, 2.))
    S = torch.linalg.svdvals(layer.weight)
    assert abs((layer.weight-2*part.B@part.A).norm()-S[4:].norm())<1e-5 and part.change(layer)['weight'].abs().max()<1e-6

def test_dropout_is_off_in_evaluation():
    net = wake(lora(rank=2, dropout=.5)(randomise(create('dit_tiny')))).eval()
    assert torch.equal(run(net), run(net))
    net.train(); torch.manual_seed(0)
    assert not torch.equal(run(net), run(net))

# --- tables and rules
def test_by_block():
    net = lora(nn.Linear, rank={'blocks.1.attn': 2, 'blocks.*': 4})(create('dit_tiny'))
    got = {k: s['default'].rank for k,_,s in slots(net)}
    assert got['blocks.1.attn.qkv']==2 and got['blocks.0.attn.qkv']==4 and 'out' not in got
    with pytest.raises(ValueError, match="'enc.9' in by_block fits none"): lora(rank=by_block({'enc.9': 2}, 4))(create('dit_tiny'))

def test_diffit_table():
    net = create('diffit_cifar10', blocks=(1, 1, 1), vec=0)
    net = diffit_lora()(net)
    rank = {k: s['default'].rank for k,_,s in slots(net)}
    for k,r in {'enc.0.0.block.attn.attn.qkv': 16, 'enc.1.0.block.mlp.0': 12, 'enc.2.0.block.mlp.2': 8, 'dec.0.0.block.attn.attn.proj': 12,
                'dec.1.0.block.attn.attn.proj': 10, 'time.mlp.0': 4, 'stem': 6, 'down.0': 4, 'out.2': 1}.items(): assert rank[k]==r, k
    assert all(s['default'].scale==pytest.approx(1/s['default'].rank) for _,_,s in slots(net)) and probe(net)==len(rank)

def test_phases():
    r,s = phases()(torch.arange(100, dtype=torch.float64)/100)
    assert [(r==o).sum().item() for o in (8, 32, 64)]==[34, 33, 33] and r[[33, 34, 66, 67]].tolist()==[8, 32, 32, 64]
    assert s[[0, 50, 99]].tolist()==[.25, .5, 1.]
    T,most,least,a = 50, 20, 3, 1.5 # T-LoRA's formula
    want = [int(((T-t)/T)**a*(most-least))+least for t in range(T)]
    assert falling(most, least, a)(torch.arange(T, dtype=torch.float64)/T)[0].tolist()==want
    with pytest.raises(ValueError, match='do not fit'): phases(ranks=(1, 2))

def test_timed_lora_is_lora_of_that_rank():
    "At each noise level it is plain LoRA with the first directions and that scale."
    net = wake(timed_lora(rank=6, rule=dict(ranks=[2, 4, 6]), steps=1000.)(randomise(create('dit_tiny', scale=1.))))
    x,_,cond = net.demo()
    parts = [s['default'] for k,_,s in slots(net) if k]
    for t,r,s in ((100, 2, .25), (500, 4, .5), (900, 6, 1.)):
        got = net(x, torch.tensor([float(t)]), **cond).detach()
        plain = wake(lora(rank=6)(randomise(create('dit_tiny', scale=1.))))
        for (_,_,q),p in zip(slots(plain), parts, strict=True):
            q['default'].A.data,q['default'].B.data = p.A.data,p.B.data.clone()
            q['default'].B.data[:,r:] = 0
            q['default'].scale = s
        assert diff(plain(x, torch.tensor([float(t)]), **cond), got)<2e-5

# --- peft
def model_of_peft(net, config):
    import peft
    return peft.get_peft_model(net, peft.LoraConfig(**config)).eval()
def random_config(seed):
    rnd = random.Random(seed)
    some = rnd.sample(['blocks.0.attn.qkv', 'blocks.1.attn.proj', 'blocks.0.mlp.2', 'stem', 'out', 'blocks.1.ada.1', 'time.mlp.2'], rnd.randint(2, 5))
    r = rnd.randint(1, 6)
    return dict(target_modules=some, r=r, lora_alpha=rnd.choice([1, 8, 12]), use_rslora=rnd.random()<.5, use_dora=seed%3==0,
                rank_pattern={some[0]: rnd.randint(1, 8)}, alpha_pattern={some[-1]: rnd.choice([2, 5])})
def label(c): return f"{'dora' if c['use_dora'] else 'rs' if c['use_rslora'] else 'lora'}"

@pytest.mark.parametrize('seed', range(8))
def test_peft_both_ways(seed, tmp_path):
    "Random targets, ranks, rank and alpha patterns, rsLoRA, DoRA: theirs in ours, and ours in theirs, the same outputs (1e-5 of values around 1)."
    import peft
    config = random_config(seed)
    theirs = model_of_peft(randomise(create('dit_tiny')), config)
    g = gen(seed)
    for k,p in theirs.named_parameters():
        if 'lora' in k: p.data = p.data+.1*torch.randn(p.shape, generator=g)
    base = randomise(create('dit_tiny'))
    x,t,cond = base.demo()
    with torch.no_grad(): want = theirs(x, t, **cond)
    assert diff(want, run(base))>1e-4
    theirs.save_pretrained(tmp_path/'theirs')
    net = load_peft(base, tmp_path/'theirs')
    tol = 1e-5*max(1., want.abs().max().item())
    assert diff(run(net), want)<tol and coverage(net, 'default').adapted.keys()==set(config['target_modules'])
    save_peft(net, tmp_path/'ours')
    again = peft.PeftModel.from_pretrained(randomise(create('dit_tiny')), tmp_path/'ours').eval()
    with torch.no_grad(): assert diff(again(x, t, **cond), want)<tol

@pytest.mark.parametrize('name,targets,use', [('bert_tiny', ['qkv', 'proj', 'transform.0'], {}), ('mlm_tiny', ['qkv', 'mlp.0'], dict(use_rslora=True)), ('mamba2_tiny', ['in_proj', 'out_proj'], dict(use_dora=True)),
                                              ('diffit_tiny', ['qkv', 'stem', 'down.0'], dict(use_dora=True))])
def test_peft_on_other_networks(name, targets, use, tmp_path):
    "Text, state spaces, maps: ours in peft and back, and the same outputs."
    import peft
    make = dora if use.get('use_dora') else rslora if use else lora
    layers = {k for k,m in create(name).named_modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d)) and getattr(m, 'groups', 1)==1}
    targets = [t for t in targets if any(k==t or k.endswith(f'.{t}') for k in layers)]
    net = wake(make(targets, rank=2, alpha=3)(randomise(create(name))))
    want = run(net)
    save_peft(net, tmp_path/'a')
    theirs = peft.PeftModel.from_pretrained(randomise(create(name)), tmp_path/'a').eval()
    x,t,cond = create(name).demo(2)
    tol = 1e-5*max(1., want.abs().max().item())
    with torch.no_grad(): assert diff(theirs(x, t, **cond), want)<tol and diff(run(switch(net, None)), want)>100*tol
    theirs.save_pretrained(tmp_path/'b')
    assert diff(run(load_peft(randomise(create(name)), tmp_path/'b')), want)<tol

def test_peft_embeddings(tmp_path):
    import peft
    theirs = model_of_peft(randomise(create('dit_tiny')), dict(target_modules=['label.table'], r=3, lora_alpha=5))
    for k,p in theirs.named_parameters():
        if 'lora' in k: p.data = .3*torch.randn(p.shape, generator=gen())
    theirs.save_pretrained(tmp_path/'a')
    net = load_peft(randomise(create('dit_tiny')), tmp_path/'a')
    x,t,cond = net.demo()
    with torch.no_grad(): want = theirs(x, t, **cond)
    assert diff(run(net), want)<1e-5
    save_peft(net, tmp_path/'b')
    again = peft.PeftModel.from_pretrained(randomise(create('dit_tiny')), tmp_path/'b').eval()
    with torch.no_grad(): assert diff(again(x, t, **cond), want)<1e-5

def test_pissa_is_written_as_lora_of_twice_the_rank(tmp_path):
    net = wake(pissa(rank=2)(randomise(create('dit_tiny'))))
    want = run(net)
    save_peft(net, tmp_path/'a')
    got = load_peft(randomise(create('dit_tiny')), tmp_path/'a')
    assert diff(run(got), want)<1e-5 and {s['default'].rank for _,_,s in slots(got)}=={4}

# --- kohya and diffusers
def mixed(): return wake(lora(['qkv', 'mlp.2', 'stem'], rank={'qkv': 4, 'blocks.0.mlp.2': 7, 'blocks.1.mlp.2': 2, 'stem': 3}, alpha=5,
                              skip='time')(randomise(create('dit_tiny'))))
def test_kohya_keeps_alpha(tmp_path):
    net = mixed()
    save_kohya(net, tmp_path/'a.safetensors')
    state = load_file(tmp_path/'a.safetensors')
    assert state['lora_unet_blocks_0_mlp_2.alpha']==pytest.approx(5.) and state['lora_unet_stem.lora_up.weight'].shape==(64, 3, 1, 1)
    got = load_kohya(randomise(create('dit_tiny')), tmp_path/'a.safetensors')
    assert diff(run(got), run(net))<1e-6*max(1., run(net).abs().max().item())
    assert {k: s['default'].scale for k,_,s in slots(got)}==pytest.approx({k: s['default'].scale for k,_,s in slots(net)})
    save_file({k: v for k,v in state.items() if not k.endswith('alpha')}, tmp_path/'b.safetensors')
    assert {s['default'].scale for _,_,s in slots(load_kohya(randomise(create('dit_tiny')), tmp_path/'b.safetensors'))}=={1.} # missing: the rank

def test_diffusers_form(tmp_path):
    net = mixed()
    save_diffusers(net, tmp_path/'a.safetensors')
    assert all(k.startswith('transformer.') for k in load_file(tmp_path/'a.safetensors'))
    assert diff(run(load_diffusers(randomise(create('dit_tiny')), tmp_path/'a.safetensors')), run(net))<2e-6*max(1., run(net).abs().max().item())

def test_names_of_stable_diffusion(tmp_path):
    "An adapter with the names of diffusers' U-Net, through the layout."
    net = wake(lora(['attn.q', 'cross.v', 'proj_in', 'conv1'], rank=2, alpha=3)(randomise(create('sd_unet_tiny'))))
    save_kohya(net, tmp_path/'a.safetensors', layout='diffusers')
    keys = load_file(tmp_path/'a.safetensors')
    assert any('attn1_to_q' in k for k in keys) and any('attn2_to_v' in k for k in keys)
    got = load_kohya(randomise(create('sd_unet_tiny')), tmp_path/'a.safetensors', layout='diffusers')
    assert diff(run(got), run(net))<1e-5

def unets():
    "A small U-Net of diffusers, ours of the same numbers, and one call of each."
    import diffusers
    from diffnb.hub.layouts import load_state
    from diffnb.hub.unet import unet_config
    torch.manual_seed(0)
    ref = randomise(diffusers.UNet2DConditionModel(sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=16, attention_head_dim=4,
        norm_num_groups=8, down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D'), up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D')))
    net = unet_config().ours(dict(ref.config)).eval()
    load_state(net, ref.state_dict(), 'unet_diffusers')
    x,ctx,t = torch.randn(1, 4, 8, 8, generator=gen()),torch.randn(1, 3, 16, generator=gen(1)),torch.tensor([100.])
    def ours():
        with torch.no_grad(): return net(x, t, ctx=ctx)
    def theirs():
        with torch.no_grad(): return ref(x, t, ctx).sample
    return net, ref, ours, theirs

@pytest.mark.parametrize('case', [dict(lora_alpha=6), dict(lora_alpha=6, use_dora=True), dict(lora_alpha=2, use_rslora=True)], ids=['lora', 'dora', 'rslora'])
@pytest.mark.parametrize('prefix', ['', 'unet.'])
def test_what_diffusers_saves(case, prefix, tmp_path):
    "Scales and ranks in the header, in both of its spellings: of a single network, and of a pipeline."
    import peft
    net,ref,ours,theirs = unets()
    base = theirs()
    ref.add_adapter(peft.LoraConfig(r=3, target_modules=['to_q', 'to_v', 'conv1', 'proj_in'], rank_pattern={'conv1': 2}, alpha_pattern={'to_v': 5}, **case))
    g = gen(2)
    for k,p in ref.named_parameters():
        if 'lora_' in k: p.data = p.data+.1*torch.randn(p.shape, generator=g)
    ref.save_lora_adapter(tmp_path)
    f = tmp_path/'pytorch_lora_weights.safetensors'
    if prefix: # what a pipeline's `save_lora_weights` makes of the same
        with safe_open(f, 'pt') as o: head = json.loads(o.metadata()['lora_adapter_metadata'])
        save_file({prefix+k: v for k,v in load_file(f).items()}, f, dict(lora_adapter_metadata=json.dumps({prefix+k: v for k,v in head.items()})))
    load_diffusers(net, f, prefix=prefix, layout='diffusers')
    assert diff(ours(), theirs())<1e-5 and diff(theirs(), base)>.1

@pytest.mark.parametrize('make', [lora, rslora, dora], ids=lambda f: f.__name__)
def test_diffusers_reads_ours(make, tmp_path):
    "Ranks, alphas and lengths, from the header: read by a network, by a pipeline, and by ours again; and what it saves of it is what we saved."
    from diffusers.loaders import StableDiffusionLoraLoaderMixin as Mixin
    net,ref,ours,theirs = unets()
    wake(make(['attn.q', 'cross.v', 'conv1'], rank={'attn.q': 2, 'cross.v': 4, 'conv1': 3}, alpha={'conv1': 7, 'attn': 5, 'cross': 6})(net))
    save_diffusers(net, tmp_path/'a.safetensors', prefix='unet.', layout='diffusers')
    base = theirs()
    ref.load_lora_adapter(tmp_path, prefix='unet', weight_name='a.safetensors')
    assert diff(ours(), theirs())<1e-5 and diff(theirs(), base)>.1
    def scales(net): return {k: s['default'].scale for k,_,s in slots(net)}
    ref.save_lora_adapter(tmp_path/'b', 'default_0')
    again = load_diffusers(unets()[0], tmp_path/'b'/'pytorch_lora_weights.safetensors', prefix='', layout='diffusers')
    assert scales(again)==pytest.approx(scales(net)) and len(set(scales(net).values()))==3
    assert all(torch.equal(v, tensors(net, 'default')[k]) for k,v in tensors(again, 'default').items())
    _,ref,_,theirs = unets()
    state,alphas,head = Mixin.lora_state_dict(tmp_path/'a.safetensors', return_lora_metadata=True)
    Mixin.load_lora_into_unet(state, alphas, ref, metadata=head)
    assert diff(ours(), theirs())<1e-5 and not alphas

def test_older_diffusers_reads_ours(tmp_path):
    "Without a header; and kohya's form, where it finds ranks and alphas that differ."
    from diffusers.loaders import StableDiffusionLoraLoaderMixin as Mixin
    net,ref,ours,theirs = unets()
    wake(lora(['attn.q', 'cross.v', 'conv1'], rank={'attn.q': 2, 'cross.v': 4, 'conv1': 3}, alpha=5)(net))
    save_diffusers(net, tmp_path/'a.safetensors', prefix='unet.', layout='diffusers', fold=True)
    base = theirs()
    ref.load_lora_adapter(load_file(tmp_path/'a.safetensors'), prefix='unet')
    assert diff(ours(), theirs())<1e-5 and diff(theirs(), base)>.1
    _,ref,_,theirs = unets()
    save_kohya(net, tmp_path/'k.safetensors', layout='diffusers')
    state,alphas = Mixin.lora_state_dict(tmp_path/'k.safetensors', unet_config=ref.config)
    Mixin.load_lora_into_unet(state, alphas, ref)
    assert diff(ours(), theirs())<1e-5 and set(alphas.values())=={5.}

def fluxes():
    "A small FLUX.1 of diffusers, ours of the same numbers, and one call of each."
    import diffusers
    from diffnb.hub.flux import flux_config
    from diffnb.hub.layouts import load_state
    from diffnb.models.flux import pack, unpack
    torch.manual_seed(0)
    ref = randomise(diffusers.FluxTransformer2DModel(in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24,
                                                     pooled_projection_dim=24, guidance_embeds=False, axes_dims_rope=(4, 6, 6)))
    net = flux_config().ours(dict(ref.config)).eval()
    load_state(net, ref.state_dict(), 'flux_diffusers')
    x,ctx,vec,t = torch.randn(1, 4, 4, 4, generator=gen()),torch.randn(1, 3, 24, generator=gen(1)),torch.randn(1, 24, generator=gen(2)),torch.tensor([.7])
    ids = diffusers.FluxPipeline._prepare_latent_image_ids(1, 2, 2, 'cpu', x.dtype)
    def ours():
        with torch.no_grad(): return net(x, t, ctx=ctx, vec=vec)
    def theirs():
        with torch.no_grad(): return unpack(ref(pack(x), ctx, vec, t, ids, torch.zeros(3, 3)).sample, (2, 2))
    return net, ref, ours, theirs

@pytest.mark.parametrize('make', [lora, dora], ids=lambda f: f.__name__)
def test_one_matrix_of_ours_is_several_of_theirs(make, tmp_path):
    "FLUX.1's questions, keys, values and MLP, the halves that it exchanges, and a last layer whose name its blocks' end in: written, read by diffusers, and read again, as it was."
    net,ref,ours,theirs = fluxes()
    base = theirs()
    assert diff(ours(), base)<1e-5*base.abs().max()
    wake(make(['qkv', 'lin1', 'mod', 'out'], rank={'qkv': 3, 'lin1': 2, 'mod': 2, 'out': 1}, alpha=4)(net))
    save_diffusers(net, tmp_path/'a.safetensors', layout='flux_diffusers')
    keys = {k.rsplit('.lora_', 1)[0] for k in load_file(tmp_path/'a.safetensors')}
    assert {'transformer.single_transformer_blocks.0.proj_mlp', 'transformer.transformer_blocks.0.attn.add_k_proj', 'transformer.proj_out', 'transformer.norm_out.linear'}<=keys
    assert 'transformer.single_transformer_blocks.0.proj_out' not in keys
    ref.load_lora_adapter(tmp_path, prefix='transformer', weight_name='a.safetensors')
    assert diff(ours(), theirs())<2e-5*base.abs().max() and diff(theirs(), base)>.1
    touched = {k for k,m in ref.named_modules() if hasattr(m, 'lora_A')}
    assert touched=={k.removeprefix('transformer.') for k in keys}
    again = load_diffusers(fluxes()[0], tmp_path/'a.safetensors', layout='flux_diffusers')
    mine,back = tensors(net, 'default'),tensors(again, 'default')
    assert mine.keys()==back.keys() and all(torch.equal(v, back[k]) for k,v in mine.items()) # ranks do not grow
    for i,(k,p) in enumerate(ref.named_parameters()): # as trained there, where the pieces read other directions
        if 'lora_A' in k: p.data = p.data+.3*torch.randn(p.shape, generator=gen(i))
    q = ref.transformer_blocks[0].attn.to_q # and one has none
    q.lora_B['default_0'].weight.data.zero_()
    if make is dora: q.lora_magnitude_vector['default_0'].weight.data = q.base_layer.weight.data.norm(dim=1)
    ref.save_lora_adapter(tmp_path/'b', 'default_0')
    f = tmp_path/'b'/'pytorch_lora_weights.safetensors'
    with safe_open(f, 'pt') as o: head = o.metadata()
    save_file({k: v for k,v in load_file(f).items() if 'transformer_blocks.0.attn.to_q' not in k or 'single' in k}, f, head)
    net,_,ours,_ = fluxes()
    load_diffusers(net, f, prefix='', layout='flux_diffusers')
    assert diff(ours(), theirs())<2e-5*base.abs().max()
    assert {s['default'].rank for k,_,s in slots(net) if k=='doubles.0.txt.qkv'}=={9} and {s['default'].rank for k,_,s in slots(net) if k=='doubles.0.img.qkv'}=={6}

@pytest.mark.parametrize('use', [dict(), dict(use_dora=True), dict(use_rslora=True)], ids=['lora', 'dora', 'rslora'])
def test_peft_on_berts_of_transformers(use, tmp_path):
    "Adapters that peft trained on transformers' own BERT, onto ours, and back: with pieces of our one matrix for questions, keys and values."
    import peft, transformers
    from diffnb.hub import load_folder
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=16)
    bert = transformers.BertForMaskedLM(config).eval()
    bert.save_pretrained(tmp_path/'bert')
    ref = peft.get_peft_model(bert, peft.LoraConfig(r=2, lora_alpha=3, target_modules=['query', 'value', 'output.dense'], rank_pattern={'value': 3}, alpha_pattern={'query': 5}, **use)).eval()
    for i,(k,p) in enumerate(ref.named_parameters()):
        if 'lora_' in k: p.data = p.data+.3*torch.randn(p.shape, generator=gen(i))
    x = torch.arange(1, 13).view(1, 12)
    with torch.no_grad(): want = ref(x).logits
    ref.save_pretrained(tmp_path/'a')
    def ours(path=None):
        net = load_folder(tmp_path/'bert').eval()
        if path: load_peft(net, tmp_path/path, layout='bert_masked_lm')
        with torch.no_grad(): return net, net(x, torch.ones(1))
    net,got = ours('a')
    assert diff(got, want)<1e-5 and diff(ours()[1], want)>1e-2
    save_peft(net, tmp_path/'b', layout='bert_masked_lm')
    again = peft.PeftModel.from_pretrained(transformers.BertForMaskedLM.from_pretrained(tmp_path/'bert'), tmp_path/'b').eval()
    with torch.no_grad(): assert diff(again(x).logits, want)<1e-5
    assert diff(ours('b')[1], want)<1e-5

# --- our files
@pytest.mark.parametrize('method', [lora, rslora, dora, pissa, lambda: timed_lora(rank=8, rule=dict(ranks=[2, 4, 8]))], ids=range(5))
def test_files(method, tmp_path):
    "The adapter alone, its numbers four bytes each; onto the same base to the bit."
    net = wake(method()(randomise(create('dit_tiny'))))
    save_adapter(net, tmp_path/'a')
    names,size = load_file(tmp_path/'a'/'adapter.safetensors'),(tmp_path/'a'/'adapter.safetensors').stat().st_size
    assert names.keys()==tensors(net, 'default').keys()
    assert 0<size-4*sum(v.numel() for v in tensors(net, 'default').values())<8000
    got = load_adapter(randomise(create('dit_tiny')), tmp_path/'a')
    assert torch.equal(run(got), run(net)) and not any(p.requires_grad for p in got.parameters())

def test_files_of_a_merged_network_have_the_base_of_the_unmerged(tmp_path):
    net = wake(lora()(randomise(create('dit_tiny'))))
    merge(net)
    save_adapter(net, tmp_path/'a')
    load_adapter(randomise(create('dit_tiny')), tmp_path/'a')

def test_hot_swap(tmp_path):
    net = wake(lora()(randomise(create('dit_tiny')), 'a'), 'a')
    net = wake(lora()(net, 'b'), 'b', 5)
    want = run(switch(net, 'b'))
    save_adapter(net, tmp_path/'b', 'b')
    where = {k: v.data_ptr() for k,v in tensors(net, 'a').items()}
    load_adapter(net, tmp_path/'b', 'a')
    assert torch.equal(run(switch(net, 'a')), want) and {k: v.data_ptr() for k,v in tensors(net, 'a').items()}==where

# --- sums
@pytest.mark.parametrize('method', [lora, pissa, dora], ids=lambda f: f.__name__)
def test_combine(method):
    "The sum of two is what both do together; of DoRA too, whose changes of weights are added."
    net = randomise(create('dit_tiny'))
    for i,n in enumerate('ab'): net = wake(method(rank=3)(net, n), n, i)
    want = run(switch(net, {'a': .7, 'b': -.4}))
    net = combine(net, {'a': .7, 'b': -.4}, 'both')
    assert diff(run(net), want)<2e-5*max(1., want.abs().max().item())

def test_closest():
    layer,g = nn.Linear(12, 9),gen()
    parts = [wake_part(lora_part(layer, 3, .5)) for _ in range(2)]
    D = sum(w*p.change(layer)['weight'] for w,p in zip((1., 2.), parts))
    for r in (1, 2, 4):
        got = closest(r)(parts, [1., 2.], layer).change(layer)['weight']
        assert abs((D-got).norm()-torch.linalg.svdvals(D)[r:].norm())<1e-5

@pytest.mark.parametrize('method', [rslora, dora, pissa, diffit_lora], ids=lambda f: f.__name__)
@pytest.mark.parametrize('name', ['diffit_tiny', 'sd_unet_tiny', 'mlm_tiny'])
def test_every_change_of_weights_merges(name, method):
    "Merged as unmerged, and the bytes of the base again; convolutions, tables and projections."
    if method is diffit_lora and name!='diffit_tiny': return
    net = wake(method()(randomise(create(name))) if method is diffit_lora else method(rank=2)(randomise(create(name))))
    before,want = {k: v.clone() for k,v in net.state_dict().items()},run(net)
    merge(net)
    assert diff(run(net), want)<1e-5*max(1., want.abs().max().item())
    changed = {k for k,v in net.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and not any('adapters' in k.split('.') for k in changed)
    assert all(torch.equal(v, before[k]) for k,v in unmerge(net).state_dict().items()) and torch.equal(run(net), want)

# --- compiled
@pytest.mark.parametrize('backend', ['eager', pytest.param('inductor', marks=pytest.mark.slow)])
def test_hot_swap_without_compiling_again(backend, tmp_path):
    "Other numbers in the place of the old ones: one graph before, the same after. In a process of its own, where annotations are not checked."
    import os, subprocess, sys
    code = '''
import sys, torch
from torch._dynamo.testing import CompileCounterWithBackend
from adapted import create, diff, randomise, run, wake
from diffnb.peft.core import switch
from diffnb.peft.files import load_adapter, save_adapter
from diffnb.peft.lora import dora, lora, timed_lora
backend, where = sys.argv[1:]
for i,make in enumerate((lora, dora, timed_lora) if backend=='eager' else (lora,)):
    torch._dynamo.reset()
    kw = dict(rank=4, rule=dict(ranks=[1, 2, 4])) if make is timed_lora else dict(rank=2)
    net = randomise(create('dit_tiny'))
    for seed,n in enumerate('ab'): net = wake(make(**kw)(net, n), n, seed)
    a, b = run(switch(net, 'a')), run(switch(net, 'b'))
    save_adapter(net, f'{where}/{i}', 'b')
    switch(net, 'a')
    count = CompileCounterWithBackend(backend)
    fast, (x, t, cond) = torch.compile(net, backend=count, fullgraph=True), net.demo(2)
    with torch.no_grad():
        assert diff(fast(x, t, **cond), a)<1e-5 and count.frame_count==1
        load_adapter(net, f'{where}/{i}', 'a')
        assert diff(fast(x, t, **cond), b)<1e-5 and count.frame_count==1, count.frame_count
        for n in 'baba': fast(*switch(net, n).demo(2)[:2], **cond) # a switch compiles once, and is remembered
        assert count.frame_count==2, count.frame_count
    assert diff(a, b)>1e-3
'''
    here = os.path.dirname(__file__)
    subprocess.run([sys.executable, '-c', code, backend, str(tmp_path)], check=True, cwd=here, env={**os.environ, 'DIFFNB_TYPECHECK': '0'})

# --- mistakes
def test_errors(tmp_path):
    base = create('dit_tiny')
    with pytest.raises(ValueError, match=r"did you mean 'qkv'"): lora(['qkw'])(base)
    with pytest.raises(ValueError, match='rank 100 does not fit Linear'): lora('qkv', rank=100)(base)
    with pytest.raises(ValueError, match='rank 0 does not fit'): lora('qkv', rank=0)(base)
    with pytest.raises(ValueError, match='not for tables'): dora('label.table')(base)
    net = wake(lora(rank=2)(base))
    save_adapter(net, tmp_path/'a')
    with pytest.raises(ValueError, match='adapter for another base'): load_adapter(randomise(create('dit_tiny')), tmp_path/'a')
    with pytest.raises(ValueError, match='adapter for another base'): load_adapter(create('mlm_tiny'), tmp_path/'a')
    load_adapter(randomise(create('dit_tiny')), tmp_path/'a', any_base=True)
    with pytest.raises(ValueError, match='has no layer blocks.0'): load_adapter(create('mamba2_tiny'), tmp_path/'a', any_base=True)
    save_peft(net, tmp_path/'p')
    f = tmp_path/'p'/'adapter_model.safetensors'
    state = load_file(f)
    save_file({**state, 'model.embed.weight': torch.zeros(2)}, f)
    with pytest.raises(ValueError, match='1 keys that are no LoRA.*model.embed.weight'): load_peft(create('dit_tiny'), tmp_path/'p')
    save_file({k: v for k,v in state.items() if 'blocks.0.attn.qkv.lora_B' not in k}, f)
    with pytest.raises(ValueError, match='only a half of blocks.0.attn.qkv'): load_peft(create('dit_tiny'), tmp_path/'p')
    save_file({k: v[:,:5].contiguous() if v.ndim==2 else v for k,v in state.items()}, f)
    with pytest.raises(ValueError, match='should be'): load_peft(create('dit_tiny'), tmp_path/'p')
    c = json.loads((tmp_path/'p'/'adapter_config.json').read_text())
    (tmp_path/'p'/'adapter_config.json').write_text(json.dumps({**c, 'peft_type': 'IA3'}))
    with pytest.raises(ValueError, match='is IA3'): load_peft(create('dit_tiny'), tmp_path/'p')
    with pytest.raises(ValueError, match='is foreign'): swap(net, 'default', {'foreign': torch.zeros(1)})
    with pytest.raises(ValueError, match='a part that only we know'): save_kohya(timed_lora(rank=8, rule=dict(ranks=[2, 4, 8]))(create('dit_tiny')), f)

def test_published_sizes_on_meta():
    "Bytes of an adapter next to the network's, without memory for either."
    with torch.device('meta'): net = lora(rank=16)(create('dit_xl_2'))
    c = coverage(net, 'default')
    d = 1152
    assert c.numbers==28*16*((d+3*d)+(d+d)+2*(d+4*d)) and c.base==sum(p.numel() for k,p in net.named_parameters() if 'adapters' not in k)
    assert c.numbers/c.base<.02

@pytest.mark.parametrize('name', ['dit_xl_2', 'mlm_1300m', 'mamba2_130m'])
def test_published_sizes_are_those_of_peft(name):
    "As many numbers as peft has behind the same layers, on the meta device."
    import peft
    from diffnb.peft.core import find
    from diffnb.peft.lora import INNER
    with torch.device('meta'):
        c = coverage(lora(rank=16)(create(name)), 'default')
        theirs = peft.get_peft_model(base := create(name), peft.LoraConfig(r=16, target_modules=list(find(base, INNER))))
    assert c.numbers==sum(p.numel() for p in theirs.parameters() if p.requires_grad) and c.numbers<.03*c.base
