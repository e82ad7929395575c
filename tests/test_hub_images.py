"DiT and latent DiffiT in everybody's spelling: diffusers' class gives the same numbers from the same weights, over random small sizes; original files are what their equations say."
import inspect, json, random
import pytest, torch
from torch import nn
from diffnb.core import create
from diffnb.hub import load_folder, load_single, save_folder, save_single
from diffnb.hub.images import dit_config, dit_diffusers, from_diffusers
from diffnb.hub.layouts import Hollow, compare, dump_state, load_state
from diffnb.models.diffit_latent import diffit_latent, diffit_latent_tiny
from diffnb.models.dit import dit, dit_moe_tiny, dit_tiny
from diffnb.models.layers import positions_2d, sinusoid

F64 = torch.float64
def gen(seed=0): return torch.Generator().manual_seed(seed)
def diff(a, b): return (a-b).abs().max().item()
def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def randomise(net, seed=0):
    "Weights of a size that keeps activations near 1, so that no part is lost beside another."
    g = gen(seed)
    for p in net.parameters():
        p.data = ((p[0].numel()**-.5 if p.ndim>1 else .2)*torch.randn(p.shape, generator=g, dtype=F64)).to(p)
    return net.eval()

# --- diffusers (spec 2.3 and 2, check 2)
@pytest.fixture(scope='module')
def theirs():
    return pytest.importorskip('diffusers').DiTTransformer2DModel

SPEC = dict(num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=3, sample_size=16,
            patch_size=2, num_embeds_ada_norm=10, norm_eps=1e-6)
def config(i):
    "The sheet's configuration, then random ones."
    if i==0: return SPEC
    r = random.Random(i)
    patch, ch = r.choice([1, 2, 4]), r.choice([1, 3, 4])
    return dict(num_attention_heads=r.choice([1, 2, 3, 5]), attention_head_dim=r.choice([4, 8, 12, 20]), in_channels=ch,
                out_channels=r.choice([None, ch, 2*ch]), num_layers=r.choice([1, 2, 4]), sample_size=patch*r.choice([2, 3, 6]),
                patch_size=patch, num_embeds_ada_norm=r.choice([1, 7, 30]), norm_eps=1e-6)

def tie(ref):
    "One embedding for all blocks, and clocks as the published network has them: theirs divides by 127 and not by 128."
    first = ref.transformer_blocks[0].norm1.emb
    for b in ref.transformer_blocks:
        b.norm1.emb.time_proj.downscale_freq_shift = 0
        b.norm1.emb.timestep_embedder.load_state_dict(first.timestep_embedder.state_dict())
        b.norm1.emb.class_embedder.load_state_dict(first.class_embedder.state_dict())
    return ref

def pair(theirs, cfg, dtype, seed=0):
    "Theirs with random weights, and ours filled from it."
    ref = tie(randomise(nn.Module.to(theirs(**cfg), dtype), seed)) # its own `to` only adds a warning
    net = dit_config().ours(dict(ref.config)).to(dtype).eval()
    report = load_state(net, ref.state_dict(), 'dit_diffusers')
    assert not report.faults() and not report.ignored
    return ref, net

def both(ref, net, dtype, seed=1):
    "The same inputs in both, among them the null label and an early and a late time; times in float32, as theirs has them."
    x = torch.randn(4, net.ch, net.size, net.size, generator=gen(seed)).to(dtype)
    n = net.label.null
    t, y = torch.tensor([17, 803, 999, 0]), torch.tensor([n, 0, n-1, n//2])
    with torch.no_grad(): return net(x, t.float(), y=y), ref(x, timestep=t, class_labels=y).sample

@pytest.mark.parametrize('i', range(8))
def test_parity(theirs, i):
    for dtype,tol in ((torch.float32, 1e-5), (F64, 1e-12)):
        got, want = both(*pair(theirs, config(i), dtype, i), dtype)
        assert want.std()>.1 and diff(got, want)<tol*max(1, want.abs().max().item()), (dtype, diff(got, want))

def test_double_times_are_as_near_as_their_clocks_allow(theirs):
    "Our processes hand over float64 times, whose angles are exact; theirs rounds them to float32. The difference stays small."
    ref, net = pair(theirs, SPEC, torch.float32)
    x, y = torch.randn(3, 4, 16, 16, generator=gen()), torch.tensor([1, 2, 10])
    with torch.no_grad():
        for t in (17, 803, 999):
            got = net(x, torch.full((1,), t, dtype=F64), y=y)
            assert diff(got, ref(x, timestep=torch.full((3,), t), class_labels=y).sample)<3e-4

def test_clocks_are_theirs(theirs):
    "In float32 the same bits, once they divide by 128."
    from diffusers.models.embeddings import get_timestep_embedding
    t = torch.arange(0, 1000, 7)
    assert torch.equal(get_timestep_embedding(t, 256, flip_sin_to_cos=True, downscale_freq_shift=0), sinusoid(t.float(), 256))

def test_their_deviations(theirs):
    "As diffusers runs them by default: the clocks change the output by much, the other epsilon by a little. Ours is the published network."
    ref, net = pair(theirs, SPEC, F64)
    got, want = both(ref, net, F64)
    for b in ref.transformer_blocks: b.norm1.emb.time_proj.downscale_freq_shift = 1
    assert diff(both(ref, net, F64)[1], got)>.1
    ref2, _ = pair(theirs, {**SPEC, 'norm_eps': 1e-5}, F64)
    assert 1e-7<diff(both(ref2, net, F64)[1], got)<1e-3 and diff(got, want)<1e-12

def test_parity_can_fail(theirs):
    "With shift and scale of the last norm exchanged all shapes fit, and the outputs do not."
    from diffnb.hub.layouts import swap
    ref, net = pair(theirs, SPEC, F64)
    load_state(net, ref.state_dict(), [r._replace(op=swap) if r.ours=='last.ada.1' else r for r in dit_diffusers(net)])
    assert diff(*both(ref, net, F64))>1e-2

def test_places(theirs): # spec 2, check 3
    assert torch.equal(theirs().pos_embed.pos_embed[0], positions_2d(16, 1152))

def test_published_tensors(theirs):
    "Names, shapes and counts of diffusers' class; 292 tensors of the original with its table of places."
    with torch.device('meta'): ref, net = theirs(out_channels=8), create('dit_xl_2')
    got = {k: v.shape for k,v in dump_state(net, 'diffusers').items()}
    assert got=={k: v.shape for k,v in ref.state_dict().items()} and len(got)==538 and sum(s.numel() for s in got.values())==749_826_464
    assert len(dump_state(net, 'original'))==292

@pytest.mark.parametrize('i', [0, 3, 5])
def test_folders(theirs, tmp_path, i):
    "Ours opens in diffusers and gives the same; theirs opens here; there and back to the bit, in shards too."
    cfg = config(i)
    ref, net = pair(theirs, cfg, torch.float32, i)
    save_folder(net, tmp_path/'a', 'diffusers', size=20_000)
    other, info = theirs.from_pretrained(tmp_path/'a', output_loading_info=True)
    assert not any(info.values()) and same(other.state_dict(), ref.state_dict())
    assert {k: v for k,v in other.config.items() if k in cfg}=={**cfg, 'out_channels': cfg['out_channels'] or cfg['in_channels']}
    got, want = both(tie(other), net, torch.float32)
    assert diff(got, want)<1e-5*max(1, want.abs().max().item())
    ref.save_pretrained(tmp_path/'b', max_shard_size='20KB')
    back = load_folder(tmp_path/'b')
    assert same(back.state_dict(), net.state_dict()) and back.preset['name']=='dit'

def test_older_class_name(theirs, tmp_path):
    "The published folders carry the name of an older class, and keys that mean nothing here."
    ref, net = pair(theirs, SPEC, torch.float32)
    ref.save_pretrained(tmp_path)
    cfg = json.loads((tmp_path/'config.json').read_text())
    older = {**cfg, '_class_name': 'Transformer2DModel', 'cross_attention_dim': None, 'num_vector_embeds': None, 'use_linear_projection': False}
    del older['norm_eps']
    (tmp_path/'config.json').write_text(json.dumps(older))
    assert same(load_folder(tmp_path).state_dict(), net.state_dict())
    (tmp_path/'config.json').write_text(json.dumps({**older, 'norm_type': 'ada_norm_single'})) # PixArt's
    with pytest.raises(ValueError, match="norm_type is 'ada_norm_single'"): load_folder(tmp_path)

def test_copies_must_agree(theirs):
    ref, net = pair(theirs, SPEC, torch.float32)
    ref.transformer_blocks[1].norm1.emb.timestep_embedder.linear_2.bias.data[0] += 1e-6
    before = {k: v.clone() for k,v in net.state_dict().items()}
    with pytest.raises(ValueError, match=r'time.mlp.2.bias has sources that differ and should be copies'): load_state(net, ref.state_dict())
    assert same(net.state_dict(), before)

@pytest.mark.parametrize('bad,words', [(dict(activation_fn='geglu'), "activation_fn is 'geglu'"), (dict(norm_eps=1e-3), 'norm_eps is 0.001'),
    (dict(out_channels=5), 'out_channels is 5, and only 4 and 8'), (dict(attention_bias=False), 'attention_bias'), (dict(dropout=.1), 'dropout'),
    (dict(sample_size=15), 'do not tile'), (dict(num_layer=3), "'num_layer' is unknown here .did you mean 'num_layers'"),
    (dict(caption_channels=8), 'caption_channels is 8'), (dict(interpolation_scale=2), 'interpolation_scale is 2')])
def test_configs_that_ours_cannot_be(bad, words):
    with pytest.raises(ValueError, match=words): from_diffusers({**SPEC, **bad})

def test_options_are_known(theirs):
    "Every option of both of diffusers' classes is read, fixed or refused by name."
    from diffusers.models.transformers.transformer_2d import Transformer2DModel
    for cls in (theirs, Transformer2DModel):
        for k,p in inspect.signature(cls.__init__).parameters.items():
            if k=='self': continue
            try: from_diffusers({**SPEC, k: p.default if k not in SPEC else SPEC[k]})
            except ValueError as e: assert 'unknown' not in str(e) and str(e).startswith(f'{k} is '), (k, e)

def test_networks_that_theirs_cannot_be(tmp_path):
    for net,words in ((dit_moe_tiny(), 'no row for blocks.0.mlp.router'), (diffit_latent_tiny(), 'no row for blocks.0.block'), (dit_tiny(sit=True), 'no SiT'),
                      (dit_tiny(classes=0), 'with labels')):
        with pytest.raises(ValueError, match=words): save_folder(net, tmp_path/'x', 'diffusers')
    assert not (tmp_path/'x').exists()

def test_config_that_does_not_fit(theirs, tmp_path):
    "A configuration of another width: one error that names the file and a tensor."
    ref, _ = pair(theirs, SPEC, torch.float32)
    ref.save_pretrained(tmp_path)
    (tmp_path/'config.json').write_text(json.dumps({**dict(ref.config), '_class_name': 'DiTTransformer2DModel', 'num_attention_heads': 2}))
    with pytest.raises(ValueError, match=r'has shape \(64, 4, 2, 2\) and should have \(32, 4, 2, 2\)'): load_folder(tmp_path)

# --- original files, by their own equations
def lin(S, n, x): return x@S[f'{n}.weight'].T+S[f'{n}.bias']
def ln(x): return (x-x.mean(-1, keepdim=True))/(x.var(-1, correction=0, keepdim=True)+1e-6).sqrt()
def silu(x): return x*torch.sigmoid(x)
def gelu(x): return x/2*(1+torch.tanh((2/torch.pi)**.5*(x+.044715*x**3)))

def attention(S, n, x, heads, extra=0, bias=0):
    d = x.shape[-1]//heads
    q, k, v = (lin(S, f'{n}.qkv', x)+extra).unflatten(-1, (3, heads, d)).permute(2, 0, 3, 1, 4)
    return lin(S, f'{n}.proj', (torch.softmax(q@k.mT*d**-.5+bias, -1)@v).transpose(1, 2).flatten(2))

def dit_block(S, b, x, c, heads):
    s1, k1, g1, s2, k2, g2 = lin(S, f'{b}.adaLN_modulation.1', silu(c))[:,None].chunk(6, -1)
    x = x+g1*attention(S, f'{b}.attn', ln(x)*(1+k1)+s1, heads)
    return x+g2*lin(S, f'{b}.mlp.fc2', gelu(lin(S, f'{b}.mlp.fc1', ln(x)*(1+k2)+s2)))

def diffit_block(S, b, x, c, heads):
    side = int(x.shape[1]**.5)
    yx = torch.tensor([(i, j) for i in range(side) for j in range(side)])
    off = yx[:,None]-yx+side-1 # Swin's numbers of the offsets, from the definition
    index = off[...,0]*(2*side-1)+off[...,1]
    if f'{b}.attn.relative_position_index' in S: assert torch.equal(S[f'{b}.attn.relative_position_index'], index)
    bias = S[f'{b}.attn.relative_position_bias_table'][index].permute(2, 0, 1)
    x = x+attention(S, f'{b}.attn', ln(x), heads, lin(S, f'{b}.attn.qkv_temb', c)[:,None], bias)
    return x+lin(S, f'{b}.mlp.fc2', gelu(lin(S, f'{b}.mlp.fc1', ln(x))))

def original(S, x, t, y, heads, patch):
    "An original file as its authors run it."
    w = torch.exp(-torch.log(torch.tensor(1e4, dtype=F64))*torch.arange(128, dtype=F64)/128)
    a = t[:,None]*w
    c = lin(S, 't_embedder.mlp.2', silu(lin(S, 't_embedder.mlp.0', torch.cat([a.cos(), a.sin()], -1))))+S['y_embedder.embedding_table.weight'][y]
    h = torch.nn.functional.conv2d(x, S['x_embedder.proj.weight'], S['x_embedder.proj.bias'], stride=patch).flatten(2).mT+S['pos_embed']
    steered = 'blocks.0.attn.qkv_temb.weight' in S
    for i in range(1+max(int(k.split('.')[1]) for k in S if k.startswith('blocks'))):
        h = (diffit_block if steered else dit_block)(S, f'blocks.{i}', h, c, heads)
    if steered: h = silu(ln(h))
    else:
        s, k = lin(S, 'final_layer.adaLN_modulation.1', silu(c))[:,None].chunk(2, -1)
        h = ln(h)*(1+k)+s
    h, n = lin(S, 'final_layer.linear', h), x.shape[-1]//patch
    return torch.einsum('nhwpqc->nchpwq', h.view(len(h), n, n, patch, patch, -1)).flatten(4).flatten(2, 3)

MAKE = [lambda: dit(3, 24, 3, size=8, classes=6), lambda: dit(1, 32, 2, patch=4, size=8, ch=3, sigma=False, classes=3),
        lambda: diffit_latent(2, 32, 4, size=8, classes=6), lambda: diffit_latent(1, 24, 2, patch=1, size=6, ch=3, classes=2)]
@pytest.mark.parametrize('i', range(len(MAKE)))
def test_original_equations(i):
    "What we write as original, run by the original's equations, is what our network computes; and it can be read again."
    net = randomise(MAKE[i]().double(), i)
    S = dump_state(net, 'original')
    x, t, y = torch.randn(3, net.ch, net.size, net.size, generator=gen(), dtype=F64), torch.tensor([17., 803., 0.], dtype=F64), torch.tensor([0, 1, net.label.null])
    heads = getattr(net.blocks[0], 'block', net.blocks[0]).attn
    want = original(S, x, t, y, getattr(heads, 'attn', heads).heads, net.patch)
    assert want.std()>.1 and diff(net(x, t, y=y), want)<1e-12
    fresh = MAKE[i]().double()
    assert not load_state(fresh, S).faults() and same(fresh.state_dict(), net.state_dict())

def test_original_names(): # spec 1.4 and 2.3
    def leaves(net): return {k.replace('blocks.1', 'blocks.0').rpartition('.')[0] for k in dump_state(net, 'original') if 'blocks' in k}
    b = 'blocks.0'
    assert leaves(dit_tiny())=={f'{b}.{o}' for o in ('attn.qkv', 'attn.proj', 'mlp.fc1', 'mlp.fc2', 'adaLN_modulation.1')}
    assert leaves(diffit_latent_tiny())=={f'{b}.attn', *(f'{b}.{o}' for o in ('attn.qkv', 'attn.qkv_temb', 'attn.proj', 'mlp.fc1', 'mlp.fc2'))}
    for net in (dit_tiny(), diffit_latent_tiny()):
        rest = {k for k in dump_state(net, 'original') if 'blocks' not in k}
        ada = {f'final_layer.adaLN_modulation.1.{o}' for o in ('weight', 'bias')} if 'last.ada.1.weight' in net.state_dict() else set()
        assert rest=={'pos_embed', 'y_embedder.embedding_table.weight', *ada,
                      *(f'{m}.{o}' for m in ('x_embedder.proj', 't_embedder.mlp.0', 't_embedder.mlp.2', 'final_layer.linear') for o in ('weight', 'bias'))}

def test_training_file(tmp_path):
    "DiT's own checkpoints: raw weights, their average, optimiser and arguments in one pickle."
    net, avg = randomise(dit_tiny()), randomise(dit_tiny(), 1)
    parts = {k: dump_state(o, 'original') for k,o in (('model', net), ('ema', avg))}
    torch.save({**parts, 'opt': dict(state={0: dict(step=torch.tensor(1.))}, param_groups=[dict(lr=1e-4)])}, tmp_path/'0400000.pt')
    for k,o in (('model', net), ('ema', avg)):
        with Hollow(): fresh = dit_tiny()
        assert load_single(fresh, tmp_path/'0400000.pt', part=k).layout=='dit_original' and same(fresh.state_dict(), o.state_dict())
    with pytest.raises(ValueError, match="'model', 'ema'"): load_single(dit_tiny(), tmp_path/'0400000.pt')
    torch.save(parts['model'], tmp_path/'plain.pt') # the published file has the tensors alone
    fresh = dit_tiny()
    load_single(fresh, tmp_path/'plain.pt')
    assert same(fresh.state_dict(), net.state_dict())

@pytest.mark.parametrize('keep', [True, False])
def test_diffit_file(tmp_path, keep):
    "With the numbers of the offsets in the file, and without."
    net, fresh = randomise(diffit_latent_tiny()), diffit_latent_tiny()
    save_single(net, tmp_path/'a.safetensors', 'original')
    if not keep:
        from safetensors.torch import load_file, save_file
        state = load_file(tmp_path/'a.safetensors')
        assert state['blocks.0.attn.relative_position_index'].dtype==torch.long
        save_file({k: v for k,v in state.items() if 'index' not in k}, tmp_path/'a.safetensors')
    report = load_single(fresh, tmp_path/'a.safetensors')
    assert not report.faults() and len(report.ignored)==2*keep and same(fresh.state_dict(), net.state_dict())

def test_sit_file():
    "SiT's file is DiT's, tensor by tensor."
    a, b = randomise(dit_tiny(sigma=True)), dit_tiny(sigma=True, sit=True)
    assert load_state(b, dump_state(a, 'original')).layout=='dit_original' and same(a.state_dict(), b.state_dict())

@pytest.mark.parametrize('make', [lambda size: dit_tiny(size=size), lambda size: diffit_latent_tiny(size=size)])
def test_another_size_is_refused(make):
    "All shapes of DiT agree between 256 and 512 pixels, but for the places."
    with pytest.raises(ValueError, match=r'stem.bias.*other places: \(1, 256, 64\) for \(1, 64, 64\)'): load_state(make(16), dump_state(make(32), 'original'))

def test_places_in_half_precision():
    "Rounded places are the same places; others are not."
    net = dit_tiny()
    S = dump_state(net, 'original')
    for dtype in (torch.float16, torch.bfloat16): load_state(net, {k: v.to(dtype) for k,v in S.items()})
    with pytest.raises(ValueError, match='other places'): load_state(net, {**S, 'pos_embed': S['pos_embed'].flip(1)})
    with pytest.raises(ValueError, match='pos_embed'): load_state(net, {k: v for k,v in S.items() if k!='pos_embed'})

def test_others_weights_are_not_ours():
    "DiT's weights for DiffiT, and the other way round."
    for a,b in ((dit_tiny, diffit_latent_tiny), (diffit_latent_tiny, dit_tiny)):
        with pytest.raises(ValueError, match='blocks.0'): load_state(a(), dump_state(b(), 'original'))

@pytest.mark.parametrize('name', ['diffit_xl_2_256', 'diffit_xl_2_512', 'dit_xl_2'])
def test_published_originals_open_without_memory(name):
    "A plan for every tensor of the published networks, on the meta device."
    with Hollow(): net = create(name)
    S = {k: v.to('meta') for k,v in dump_state(net, 'original').items()}
    side = net.size//net.patch
    if name!='dit_xl_2': assert S['blocks.27.attn.relative_position_bias_table'].shape==((2*side-1)**2, 16)
    net.pos = net.pos.to('meta')
    assert not compare(net, S, 'original').faults()
