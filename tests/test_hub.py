"Everybody's weights: what fits is loaded to the bit, and what does not is said in one line before anything is touched."
import ctypes, inspect, json, shutil
from pathlib import Path
import pytest, torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from diffnb.core import Denoiser, Feats, preset, presets
from diffnb.hub import (Files, cut, find_layout, load_folder, load_single, open_folder, open_index, open_pickle, placed, save_folder,
                        save_single, sets_in)
from diffnb.hub import layouts
from diffnb.hub.layouts import (Config, Hollow, Op, Row, as_conv, as_linear, as_patches, cat, cat_of, compare, copies, dump_state, each,
                                ignore, layouts_of, load_state, made, only, plan, rows_of, same, split, swap)
from diffnb.store import Damaged, check_plain, load_json, save_json, save_tensors, write_folder

class HubToy(Denoiser):
    "A little of everything: fused, convolved, tied, a table, a counter."
    def __init__(self, d, depth, tied):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict(dict(qkv=nn.Linear(d, 3*d), proj=nn.Conv2d(d, d, 1))) for _ in range(depth))
        self.emb, self.out = nn.Embedding(2*d, d), nn.Linear(d, 2*d)
        if tied: self.out.weight = self.emb.weight
        self.register_buffer('count', torch.tensor(3))
        self.register_buffer('table', torch.arange(d, dtype=torch.float64), persistent=False)
    def features(self, x, net_t, **cond): return Feats(self.emb(x))
    def head(self, feats): return self.out(feats.h)

@preset('denoiser')
def hub_toy(d=4, depth=2, tied=False): return HubToy(d, depth, tied)

@preset('layout', model='HubToy', of='somebody')
def hub_toy_somebody(net):
    rows = [r for i in range(len(net.blocks)) for r in (Row(f'blocks.{i}.qkv', tuple(f'layers.{i}.{o}' for o in 'qkv'), cat),
                                                       Row(f'blocks.{i}.proj', f'layers.{i}.proj', as_conv))]
    return [*rows, Row('emb', ('emb.a', 'emb.b'), copies), Row('out', 'head', swap), Row('count', 'steps'), made('table', lambda: net.table),
            ignore('loss')]

@preset('layout', model='HubToy', of='somebody')
def hub_toy_somebody_else(net): return [Row('', 'else')]

@preset('layout', model='HubToy', of='old')
def hub_toy_old(net):
    if len(net.blocks)>2: raise ValueError('the old form has two blocks')
    return [Row('', ''), Row('blocks', 'layers')]

@preset('config', cls='HubToyModel', model='HubToy', layout='hub_toy_somebody')
def hub_toy_model():
    def ours(config):
        only(config, activation='gelu', norm=(None, 'layer'))
        return hub_toy(d=config['width'], depth=config['num_layers'])
    return Config(ours, lambda net: dict(width=net.out.in_features, num_layers=len(net.blocks), activation='gelu'))

@preset('config', cls='HubToyForCausalLM', model='HubToy', layout='hub_toy_old', stem='model')
def hub_toy_lm():
    return Config(lambda c: hub_toy(d=c['hidden_size']), lambda net: dict(architectures=['HubToyForCausalLM'], hidden_size=net.out.in_features))

def randomise(net, seed=0):
    "Other values everywhere, since zeros and ones hide exchanges."
    g = torch.Generator().manual_seed(seed)
    for t in net.state_dict().values():
        if t.is_floating_point(): t.copy_(torch.randn(t.shape, generator=g, dtype=torch.float64))
    return net

def bits(net): return {k: t.clone() for k,t in net.state_dict().items()}
def alike(a, b): return a.keys()==b.keys() and all(a[k].dtype==b[k].dtype and torch.equal(a[k], b[k]) for k in a)
@pytest.fixture
def net(): return randomise(hub_toy())
@pytest.fixture
def theirs(net): return dump_state(net, 'hub_toy_somebody')

# --- operations ---
def rand(*shape): return torch.randn(*shape, generator=torch.Generator().manual_seed(1))
CASES = {'same': (same, [rand(3, 2), rand(2)], 2), 'cat': (cat, [rand(2, 5), rand(2, 5)], 1), 'cat_of': (cat_of(1, 2), [rand(2, 3), rand(4, 3)], 1),
         'split': (split, [rand(6, 2)], 3), 'swap': (swap, [rand(4, 3), rand(4)], 2), 'as_linear': (as_linear, [rand(5, 3, 1, 1), rand(5)], 2),
         'as_conv': (as_conv, [rand(5, 3), rand(5)], 2), 'as_patches': (as_patches(2), [rand(5, 3, 2, 2), rand(5)], 2),
         'copies': (copies, [rand(2, 2)]*3, 1), 'then': (as_linear.then(cat), [rand(2, 3, 1, 1), rand(2, 3, 1, 1)], 1),
         'unequal_then': (swap.then(cat_of(1, 3)), [rand(2, 3), rand(6, 3)], 1), 'turned': (cat_of(1, 2).turned(), [rand(6, 3)], 2)}
@pytest.mark.parametrize('name', CASES)
def test_op(name):
    "There and back is exact, there are as many tensors as asked for, and the numbers are the same ones."
    op, ts, n = CASES[name]
    ours = op.ours(ts, n)
    back = op.theirs(ours, len(ts))
    assert len(ours)==n and len(back)==len(ts) and all(map(torch.equal, back, ts))
    if name!='copies': assert torch.equal(torch.cat([o.flatten() for o in ours]).sort()[0], torch.cat([o.flatten() for o in ts]).sort()[0])
    if name not in ('same', 'copies'): assert [o.tolist() for o in ours]!=[o.tolist() for o in ts]

def test_op_faults():
    "Rows that cannot be cut are said, and a condition on values survives composition."
    for op in (cat_of(1, 2), cat_of(1, 1, 1)):
        with pytest.raises(ValueError, match='4 rows cannot be cut into 2 parts'): op.theirs([torch.zeros(4)], 2)
    assert as_linear.then(copies).check([torch.zeros(1), torch.ones(1)]) and not swap.then(copies).check([torch.zeros(1)]*2)

def test_op_meaning():
    "Against the layers themselves: a patch convolution is a linear layer on patches, a 1x1 convolution one on channels."
    from diffnb.models.layers import patchify
    conv, lin, x = nn.Conv2d(3, 5, 2, stride=2), nn.Linear(12, 5), rand(2, 3, 4, 6)
    lin.weight.data, lin.bias.data = as_patches(2).ours([conv.weight.data, conv.bias.data], 2)
    torch.testing.assert_close(lin(patchify(x, 2)), conv(x).flatten(2).mT)
    one = nn.Conv2d(3, 5, 1)
    w, b = as_linear.ours([one.weight, one.bias], 2)
    torch.testing.assert_close(nn.functional.linear(x.movedim(1, -1), w, b), one(x).movedim(1, -1))

# --- the plan ---
def test_plan_covers(net):
    moves = plan(net, hub_toy_somebody(net))
    assert sorted(k for m in moves for k in m.ours)==sorted(net.state_dict())
    assert Row(('blocks.1.qkv.bias',), tuple(f'layers.1.{o}.bias' for o in 'qkv'), cat) in moves
def test_longest_prefix(net):
    moves = {m.ours: m.theirs for m in plan(net, [Row('', 'x'), Row('blocks', 'x.blocks'), Row('blocks.0', 'first'), Row('blocks.0.qkv.bias', 'b')])}
    assert moves[('out.bias',)]==('x.out.bias',) and moves[('blocks.1.qkv.bias',)]==('x.blocks.1.qkv.bias',)
    assert moves[('blocks.0.qkv.weight',)]==('first.qkv.weight',) and moves[('blocks.0.qkv.bias',)]==('b',)
def test_prefix_ends_at_dot():
    net = nn.ModuleDict({'a': nn.Linear(1, 1), 'ab': nn.Linear(1, 1)})
    assert {m.theirs[0] for m in plan(net, [Row('a', 'x'), Row('', '')])}=={'x.weight', 'x.bias', 'ab.weight', 'ab.bias'}
@pytest.mark.parametrize('rows, says', [([Row('blocks', 'x')], 'no row for count'), ([Row('', ''), Row('out', 'emb')], 'makes emb.weight of'),
    ([Row('', ''), Row(('emb', 'out'), 'x', split)], "belong together, and only ['out.bias'] have a .bias")])
def test_plan_faults(net, rows, says):
    with pytest.raises(ValueError) as e: plan(net, rows)
    assert says in str(e.value)

# --- loading ---
def test_round_trip(net, theirs):
    fresh = randomise(hub_toy(), 1)
    r = load_state(fresh, {**theirs, 'loss.logvar': torch.zeros(1), 'loss.net.0.weight': torch.zeros(1)})
    assert alike(bits(net), bits(fresh)) and r.layout=='hub_toy_somebody' and r.ignored==['loss.logvar', 'loss.net.0.weight', 'table']
    assert theirs.keys()>={'layers.1.q.weight', 'steps', 'table', 'emb.a.weight', 'emb.b.weight'} and theirs['layers.0.proj.weight'].ndim==2
    assert torch.equal(theirs['head.bias'], torch.cat(net.out.bias.detach().chunk(2)[::-1]))

def drop(s, k): return {o: t for o,t in s.items() if o!=k}
FAULTS = {'missing': (lambda s: drop(s, 'layers.0.k.bias'), 'blocks.0.qkv.bias is missing (no layers.0.k.bias)'),
    'unexpected': (lambda s: {**s, 'more.weight': torch.zeros(1)}, 'more.weight is unexpected'),
    'misspelt': (lambda s: {**drop(s, 'head.bias'), 'haed.bias': s['head.bias']}, "haed.bias is unexpected (did you mean 'head.bias'?)"),
    'shape': (lambda s: {**s, 'head.bias': torch.zeros(6)}, 'out.bias has shape (6,) and should have (8,) (from head.bias)'),
    'odd': (lambda s: {**s, 'head.bias': torch.zeros(7)}, 'out.bias cannot be made of [(7,)]: 7 rows have no halves'),
    'dtype': (lambda s: {**s, 'steps': torch.tensor(.5)}, 'count is torch.float32 and should be torch.int64'),
    'unlike_parts': (lambda s: {**s, 'layers.1.k.weight': torch.zeros(4, 3)}, 'blocks.1.qkv.weight cannot be made of'),
    'copies': (lambda s: {**s, 'emb.b.weight': s['emb.b.weight']+1}, 'emb.weight has sources that differ and should be copies: emb.a.weight')}
@pytest.mark.parametrize('name', FAULTS)
def test_nothing_by_halves(net, theirs, name):
    "One line that names the tensor, and not a single number of the network has changed, nor its dtypes."
    spoil, says = FAULTS[name]
    fresh = randomise(hub_toy(), 1)
    before = bits(fresh)
    with pytest.raises(ValueError) as e: load_state(fresh, spoil(theirs), 'somebody', dtype=torch.bfloat16)
    assert says in str(e.value) and '\n' not in str(e.value) and alike(before, bits(fresh))

def test_zero_matches(net, theirs):
    "An error even if everything may be missing; it says what was tried and what is there."
    for strict in (True, False):
        with pytest.raises(ValueError, match=r'none of the tensors fits HubToy \(layouts tried: ours, hub_toy_old, hub_toy_somebody, hub_toy_somebody_else\): they are called x'):
            load_state(net, {'x': torch.zeros(1)}, strict=strict)
        with pytest.raises(ValueError, match='there are none'): load_state(net, {}, strict=strict)
        with pytest.raises(ValueError, match=r'layouts tried: ours\)'): load_state(net, drop(theirs, 'table'), 'ours', strict=strict)

def test_not_strict(net, theirs):
    "Missing and unexpected tensors may be allowed; other shapes never."
    fresh = randomise(hub_toy(), 1)
    before = bits(fresh)
    r = load_state(fresh, {**drop(theirs, 'layers.0.k.bias'), 'more': torch.zeros(1)}, strict=False)
    assert r.missing=={'blocks.0.qkv.bias': ['layers.0.k.bias']} and r.unexpected==['more']
    assert alike({**bits(net), 'blocks.0.qkv.bias': before['blocks.0.qkv.bias']}, bits(fresh))
    with pytest.raises(ValueError, match='has shape'): load_state(fresh, {**theirs, 'head.weight': torch.zeros(2, 2)}, strict=False)

def test_dtypes(theirs):
    "The network's own; on request another; for a network without memory the file's. Integers and tables stay as they are."
    half = {k: t.half() if t.is_floating_point() else t for k,t in theirs.items()}
    def dtypes(net): return {t.dtype for t in net.parameters()}
    net = hub_toy()
    kept = list(net.parameters())
    load_state(net, half)
    assert dtypes(net)=={torch.float32} and torch.equal(net.out.bias, swap.ours([half['head.bias'].float()], 1)[0])
    load_state(net, theirs, dtype=torch.bfloat16)
    assert dtypes(net)=={torch.bfloat16} and all(a is b for a,b in zip(kept, net.parameters())) # an optimiser holds on to them
    for dtype,want in ((None, torch.float16), (torch.float64, torch.float64)):
        with Hollow(): net = hub_toy()
        load_state(net, half, dtype=dtype)
        assert dtypes(net)=={want} and net.count.dtype==torch.int64 and net.table.dtype==torch.float64
    assert hub_toy().out.weight.device.type=='cpu' # after Hollow all is as before

def test_hollow():
    "Weights have no memory, tables do; what stays without is an error, and so is a network whose tables have none."
    with Hollow(): net = hub_toy(tied=True)
    assert all(p.is_meta for p in net.parameters()) and torch.equal(net.table, torch.arange(4.).double())
    full = randomise(hub_toy(tied=True))
    load_state(net, full.state_dict())
    assert alike(bits(net), bits(full)) and net.out.weight is net.emb.weight and net.out.weight.requires_grad
    assert all(isinstance(p, nn.Parameter) for p in net.parameters())
    with torch.device('meta'): empty = hub_toy()
    with pytest.raises(ValueError, match='table has no memory'): load_state(empty, hub_toy().state_dict())
    with Hollow(): net = hub_toy()
    with pytest.raises(ValueError, match='out.bias has no memory'): load_state(net, drop(full.state_dict(), 'out.bias'), strict=False)
    assert all(p.is_meta for p in net.parameters())

@pytest.mark.parametrize('layout', ['ours', 'somebody', 'old'])
def test_no_shared_memory(net, layout):
    "What is loaded belongs to the network alone: changing it changes neither the file's tensors nor another parameter."
    state = dump_state(net, layout)
    with Hollow(): other = hub_toy()
    load_state(other, state, layout)
    kept, mine = {k: t.clone() for k,t in state.items()}, bits(other)
    for t in other.state_dict().values(): t += 1
    assert alike(kept, state) and all(torch.equal(t, mine[k]+1) for k,t in other.state_dict().items())
    assert len({t.untyped_storage().data_ptr() for t in state.values()})==len(state)

def test_one_for_two(net):
    "Two parameters that come from one tensor, and are not tied, part ways."
    twice = Op(lambda ts,n: [ts[0]+0]*n, lambda ts,n: [ts[0]])
    with Hollow(): other = hub_toy()
    rows = [Row(('emb.weight', 'out.weight'), 'both', twice), Row('', '')]
    load_state(other, dump_state(net, rows), rows)
    assert torch.equal(other.out.weight, other.emb.weight) and other.out.weight.data_ptr()!=other.emb.weight.data_ptr()

def test_tied(net):
    "A tied pair may come under either name or both; two that differ are refused; dumped once."
    tied = randomise(hub_toy(tied=True))
    state = tied.state_dict()
    assert 'out.weight' not in dump_state(tied) and dump_state(tied).keys()|{'out.weight'}==state.keys()
    for s in (state, drop(state, 'out.weight'), drop(state, 'emb.weight')):
        other = hub_toy(tied=True)
        load_state(other, s)
        assert alike(bits(tied), bits(other)) and other.out.weight is other.emb.weight
    with pytest.raises(ValueError, match='emb.weight has sources that differ and should be copies: emb.weight, out.weight'):
        load_state(tied, net.state_dict())

# --- which layout ---
def test_best_layout(net, theirs):
    assert compare(net, net.state_dict()).layout=='ours' and compare(net, theirs).layout=='hub_toy_somebody'
    assert compare(net, dump_state(net, 'old')).layout=='hub_toy_old'
    wide = {**dump_state(hub_toy(d=6), 'ours'), **drop(theirs, 'head.bias')} # all of our names, in shapes that fit nothing
    assert compare(net, wide).layout=='hub_toy_somebody'
    deep = hub_toy(depth=3) # has no old form, and that is no fault while looking
    assert compare(deep, dump_state(deep, 'somebody')).layout=='hub_toy_somebody'
    with pytest.raises(ValueError, match='the old form has two blocks'): dump_state(deep, 'old')

def test_unknown_layout(net):
    with pytest.raises(ValueError, match=r"no layout is called 'sombody' \(did you mean 'somebody'\?\)"): dump_state(net, 'sombody')
    with pytest.raises(ValueError, match='hub_toy_old is a layout of HubToy, not of Linear'): dump_state(nn.Linear(2, 2), 'hub_toy_old')
    assert rows_of(net, 'somebody')[0]=='hub_toy_somebody' # the first of two
    assert rows_of(net, lambda net: [Row('', 'x')])[1]==[Row(('',), ('x',))]

@pytest.mark.parametrize('prefix', ['module', 'model.diffusion_model', 'a.b.c.d'])
@pytest.mark.parametrize('layout', ['ours', 'somebody'])
def test_prefix(net, layout, prefix):
    "The prefix is found for itself, and what lies outside belongs to others; what lacks inside is missing."
    state = {**dump_state(net, placed(layout, prefix)), 'other.head.weight': torch.zeros(1), 'layers.0.q.weight': torch.zeros(1)}
    fresh = hub_toy()
    r = load_state(fresh, state, find_layout(fresh, state))
    assert alike(bits(net), bits(fresh)) and {'other.head.weight', 'layers.0.q.weight'}<=set(r.ignored) and prefix in r.layout
    some = next(k for k in state if k.endswith('bias'))
    with pytest.raises(ValueError, match=f'no {some}|{some.removeprefix(prefix+".")} is missing'):
        load_state(fresh, drop(state, some), find_layout(fresh, state))

# --- files ---
@pytest.fixture
def folder(net, tmp_path):
    save_folder(net, tmp_path/'theirs', 'somebody', size=200)
    (tmp_path/'theirs'/'manifest.json').unlink() # as if it came from elsewhere
    return tmp_path/'theirs'
def shard(folder): return sorted(folder.glob('*-00002-of-*.safetensors'))[0]
def index_of(folder): return folder/'diffusion_pytorch_model.safetensors.index.json'
def edit(path, **changes): save_json(path, {**load_json(path), **changes})
def fails(f, *says, error=ValueError):
    "One line with all the words."
    with pytest.raises(error) as e: f()
    text = str(e.value)
    assert '\n' not in text and all(w in text for w in says), text

def test_shards(net, folder):
    files = sorted(f.name for f in folder.glob('*.safetensors'))
    assert len(files)>3 and files[0]==f'diffusion_pytorch_model-00001-of-{len(files):05d}.safetensors'
    assert all(sum(t.nbytes for t in s.values())<=200 or len(s)==1 for s in (load_file(folder/f) for f in files))
    with safe_open(folder/files[0], 'pt') as f: assert f.metadata()=={'format': 'pt'} # transformers looks for it
    assert load_json(index_of(folder))['metadata']['total_size']==sum(t.nbytes for f in files for t in load_file(folder/f).values())
    assert alike(bits(net), bits(load_folder(folder)))
def test_cut():
    a, b, c = torch.zeros(10), torch.zeros(2), torch.zeros(3)
    assert [list(s) for s in cut(dict(a=a, b=b, c=c), 20)]==[['a'], ['b', 'c']] and cut({}, 20)==[{}] and len(cut(dict(b=b, c=c), 4))==2

@pytest.mark.parametrize('keep', [0, 3, 8, 60, -1])
def test_truncated_shard(folder, keep):
    f = shard(folder)
    f.write_bytes(f.read_bytes()[:keep])
    fails(lambda: load_folder(folder), f.name, 'not a whole safetensors file', error=Damaged)
def test_garbage_shard(folder):
    shard(folder).write_bytes(b'\xff'*400)
    fails(lambda: load_folder(folder), shard(folder).name, error=Damaged)
def test_missing_shard(folder):
    name = shard(folder).name
    shard(folder).unlink()
    fails(lambda: load_folder(folder), index_of(folder).name, f'{name}, which is not there', error=Damaged)
def test_lying_index(folder):
    where = load_json(index_of(folder))['weight_map']
    edit(index_of(folder), weight_map={**where, 'nobody.weight': shard(folder).name})
    fails(lambda: load_folder(folder), f'nobody.weight is in {shard(folder).name}, and it is not', error=Damaged)
def test_silent_index(net, folder):
    "What an index keeps silent about is seen all the same: a tensor more is unexpected."
    save_file({**load_file(shard(folder)), 'more.weight': torch.zeros(2)}, shard(folder))
    fails(lambda: load_folder(folder), 'more.weight is unexpected')
@pytest.mark.parametrize('content', ['[]', '{}', '{"weight_map": 3}', '{"weight_map": {"a": 1}}', '{', ''])
def test_no_index(folder, content):
    index_of(folder).write_text(content)
    fails(lambda: load_folder(folder), index_of(folder).name, error=Damaged)
@pytest.mark.parametrize('name', ['../secret.safetensors', '/secret.safetensors', 'sub/x.safetensors', '..', '', '.', 'a\\b', 'a\0b'])
def test_index_leaves_folder(folder, name):
    where = load_json(index_of(folder))['weight_map']
    index_of(folder).write_text(json.dumps(dict(weight_map={**where, 'head.bias': name})))
    fails(lambda: load_folder(folder), index_of(folder).name, 'no file of the same folder', error=Damaged)
@pytest.mark.parametrize('part', ['..', '../theirs', 'a/../../b', '/etc'])
def test_part_leaves_folder(net, folder, part):
    save_folder(net, folder/'a')
    fails(lambda: load_folder(folder/'a', part=part), 'leaves the folder')

def test_wrong_layout(folder):
    fails(lambda: load_folder(folder, layout='old'), str(folder), 'blocks.0.qkv.weight is missing (no layers.0.qkv.weight)', 'layout hub_toy_old: 2 matched',
          'layout hub_toy_somebody fits better')
    fails(lambda: load_folder(folder, layout='oldd'), "did you mean 'old'")
def test_files_are_not_kept(folder):
    "A network that is loaded lives on when its folder is gone, and can be changed."
    net = load_folder(folder)
    before = bits(net)
    shutil.rmtree(folder)
    assert alike(before, bits(net))
    with torch.no_grad():
        for p in net.parameters(): p += 1

def anon():
    "Bytes of memory that this process has and no file backs, swapped out or not."
    return sum(1024*int(o.split()[1]) for o in open('/proc/self/status') if o.startswith(('RssAnon', 'VmSwap')))
def test_memory(tmp_path, monkeypatch):
    "While a folder is loaded, the network is the only copy of its weights: tensors are read one by one, none before its turn."
    if not Path('/proc/self/status').exists(): pytest.skip('needs the memory figures of Linux')
    net = hub_toy(d=512, depth=24) # 100 MB
    save_folder(net, tmp_path/'a', 'somebody', size=20*2**20)
    size, seen, get = sum(p.nbytes for p in net.parameters()), [], Files.__getitem__
    monkeypatch.setattr(Files, '__getitem__', lambda self, k: (seen.append(anon()), get(self, k))[1])
    ctypes.CDLL(None).malloc_trim(0) # nothing that was freed is to be used again
    start = anon()
    other = load_folder(tmp_path/'a')
    assert .9*size<max(seen)-start<1.15*size and torch.equal(other.out.weight, net.out.weight)

# --- configurations ---
@pytest.mark.parametrize('change, says', [(dict(width=6), 'blocks.0.qkv.weight has shape (12, 4) and should have (18, 6)'),
    (dict(num_layers=3), 'blocks.2.qkv.weight is missing (no layers.2.q.weight)'), (dict(num_layers=1), 'layers.1.k.bias is unexpected'),
    (dict(activation='relu'), "activation is 'relu', and only 'gelu' is supported"), (dict(norm='rms'), "only None or 'layer'"),
    (dict(_class_name='HubToyModle'), "no network here reads HubToyModle (did you mean 'HubToyModel'?)"),
    (dict(_class_name=None), 'names neither a class nor a preset'), (dict(width='wide'), 'config.json')])
def test_config_faults(folder, change, says):
    edit(folder/'config.json', **change)
    fails(lambda: load_folder(folder), str(folder), says)
def test_config_lacks(folder):
    save_json(folder/'config.json', dict(_class_name='HubToyModel', width=4))
    fails(lambda: load_folder(folder), 'config.json: num_layers is missing')
    save_json(folder/'config.json', [])
    fails(lambda: load_folder(folder), 'config.json names neither')
    (folder/'config.json').write_text('{')
    fails(lambda: load_folder(folder), 'config.json: not valid JSON')
    (folder/'config.json').unlink()
    fails(lambda: load_folder(folder), 'has no config.json', error=FileNotFoundError)
def test_no_tensors(folder):
    for f in folder.glob('diff*'): f.unlink()
    fails(lambda: load_folder(folder), 'no diffusion_pytorch_model.safetensors', error=FileNotFoundError)
def test_architectures(net, tmp_path):
    "A folder after transformers' custom."
    save_folder(net, tmp_path/'lm', 'old')
    assert sorted(f.name for f in (tmp_path/'lm').iterdir())==['config.json', 'manifest.json', 'model.safetensors']
    assert '_class_name' not in load_json(tmp_path/'lm'/'config.json') and alike(bits(net), bits(load_folder(tmp_path/'lm')))

# --- folders ---
def test_look_first(net, folder):
    hollow, state = open_folder(folder)
    assert isinstance(state, Files) and all(p.is_meta for p in hollow.parameters())
    r = compare(hollow, state)
    assert not r.faults() and r.counts()=='layout hub_toy_somebody: 12 matched, 0 missing, 0 unexpected, 0 mismatched, 1 ignored'
def test_pipeline(net, folder, tmp_path):
    (tmp_path/'pipe').mkdir()
    folder.rename(tmp_path/'pipe'/'unet')
    save_json(tmp_path/'pipe'/'model_index.json', dict(_class_name='P', unet=['diffusers', 'HubToyModel'], vae=['diffusers', 'V']))
    assert alike(bits(net), bits(load_folder(tmp_path/'pipe', 'unet')))
    fails(lambda: load_folder(tmp_path/'pipe'), 'is a pipeline: say which of unet, vae')
    fails(lambda: load_folder(tmp_path/'pipe', 'vae'), 'pipe/vae', error=FileNotFoundError)
def test_variant_and_bin(net, tmp_path):
    half = hub_toy()
    load_state(half, net.state_dict(), dtype=torch.float16)
    save_folder(net, tmp_path/'a', 'somebody')
    f = tmp_path/'a'/'diffusion_pytorch_model.safetensors'
    (tmp_path/'a'/'manifest.json').unlink()
    save_single(half, f.with_name('diffusion_pytorch_model.fp16.safetensors'), 'somebody')
    assert alike(bits(half), bits(load_folder(tmp_path/'a', variant='fp16'))) and alike(bits(net), bits(load_folder(tmp_path/'a')))
    fails(lambda: load_folder(tmp_path/'a', variant='fp8'), 'of the variant fp8', error=FileNotFoundError)
    torch.save(load_file(f), f.with_suffix('.bin'))
    f.unlink()
    assert alike(bits(net), bits(load_folder(tmp_path/'a')))
def test_dtype_device(folder):
    net = load_folder(folder, dtype=torch.bfloat16, device='cpu')
    assert {p.dtype for p in net.parameters()}=={torch.bfloat16} and net.table.dtype==torch.float64 and not net.training
def test_sealed(net, tmp_path):
    "A folder that we wrote has a manifest, which is held against it; somebody else's manifest.json is their affair."
    save_folder(net, tmp_path/'a', 'somebody')
    edit(tmp_path/'a'/'config.json', note='changed')
    fails(lambda: load_folder(tmp_path/'a'), 'config.json', 'changed on purpose, delete manifest.json', error=Damaged)
    save_json(tmp_path/'a'/'manifest.json', dict(name='a web application'))
    assert alike(bits(net), bits(load_folder(tmp_path/'a')))

def test_ours(net, tmp_path):
    save_folder(net, tmp_path/'a')
    assert load_json(tmp_path/'a'/'config.json')['name']=='hub_toy' and alike(bits(net), bits(load_folder(tmp_path/'a')))
    assert load_folder(tmp_path/'a', dtype=torch.bfloat16).out.weight.dtype==torch.bfloat16
    f = tmp_path/'a'/'model.safetensors'
    f.write_bytes(f.read_bytes()[:-1])
    fails(lambda: load_folder(tmp_path/'a'), 'model.safetensors', error=Damaged)

def test_run(net, tmp_path):
    "A training run: the newest whole checkpoint, its average unless the raw weights are asked for, frozen weights as they are."
    from diffnb.rng import Rng
    from diffnb.train.checkpoint import Progress, save_checkpoint
    from diffnb.train.ema import EMA
    net.emb.weight.requires_grad_(False)
    ema, opt = EMA(net), torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 1e-3)
    with torch.no_grad():
        for t in ema.avg.values(): t += 1
    for step in (9, 10): save_checkpoint(tmp_path/'run', net, opt, {'ema': ema}, Progress(step=step), Rng(0, 'run'))
    raw, avg = load_folder(tmp_path/'run', average=None), load_folder(tmp_path/'run')
    assert alike(bits(net), bits(raw)) and not avg.training
    assert all(torch.equal(t, net.state_dict()[k]+(k in ema.avg)) for k,t in avg.state_dict().items()) and 'emb.weight' not in ema.avg
    fails(lambda: load_folder(tmp_path/'run', average='emma'), "no average 'emma' (did you mean 'ema'?)")
    (tmp_path/'run'/'step-00000010'/'model.safetensors').write_bytes(b'')
    assert alike(bits(net), bits(load_folder(tmp_path/'run', average=None))) # the one before
    (tmp_path/'run'/'step-00000009'/'model.safetensors').write_bytes(b'')
    fails(lambda: load_folder(tmp_path/'run'), 'run has no whole checkpoint: step-00000010', error=Damaged)

def test_strange_average(net, tmp_path):
    save_folder(net, tmp_path/'a')
    with write_folder(tmp_path/'b') as d:
        shutil.copytree(tmp_path/'a', d, dirs_exist_ok=True, ignore=lambda *_: ['manifest.json'])
        save_tensors(d/'ema-ema.safetensors', {**dump_state(net), 'more.weight': torch.zeros(1)})
    fails(lambda: load_folder(tmp_path/'b'), 'ema-ema.safetensors: more.weight is unexpected')

def test_replaces_networks_only(net, tmp_path):
    (tmp_path/'pipe').mkdir()
    save_json(tmp_path/'pipe'/'model_index.json', {})
    for layout in (None, 'somebody'): fails(lambda: save_folder(net, tmp_path/'pipe', layout), 'take another name')
    save_folder(net, tmp_path/'pipe'/'unet', 'somebody')
    save_folder(randomise(net, 3), tmp_path/'pipe'/'unet', 'somebody')
    assert alike(bits(net), bits(load_folder(tmp_path/'pipe', 'unet')))
def test_failed_save(net, tmp_path, monkeypatch):
    "The old folder is there as it was if writing the new one fails."
    save_folder(net, tmp_path/'a', 'somebody', size=200)
    before = {f.name: f.read_bytes() for f in (tmp_path/'a').iterdir()}
    calls = []
    def broken(tensors, path, **kw):
        calls.append(path)
        if len(calls)==3: raise OSError('no more')
        save_file(tensors, path, **kw)
    monkeypatch.setattr('diffnb.hub.save_file', broken)
    with pytest.raises(OSError, match='no more'): save_folder(randomise(net, 3), tmp_path/'a', 'somebody', size=200)
    assert before=={f.name: f.read_bytes() for f in (tmp_path/'a').iterdir()} and [f.name for f in tmp_path.iterdir()]==['a']
def test_failed_single(net, tmp_path, monkeypatch):
    "Likewise a single file."
    save_single(net, tmp_path/'a.safetensors')
    before = (tmp_path/'a.safetensors').read_bytes()
    def broken(tensors, path, **kw): Path(path).write_bytes(b'half'); raise OSError('no more')
    monkeypatch.setattr('diffnb.hub.save_file', broken)
    with pytest.raises(OSError, match='no more'): save_single(randomise(net, 3), tmp_path/'a.safetensors')
    assert before==(tmp_path/'a.safetensors').read_bytes() and [f.name for f in tmp_path.iterdir()]==['a.safetensors']
def test_no_room(net, tmp_path, monkeypatch):
    "Room is asked for before anything is written."
    size = sum(p.nbytes for p in net.parameters())
    monkeypatch.setattr('diffnb.store.shutil.disk_usage', lambda path: type('U', (), dict(free=size)))
    with pytest.raises(OSError, match='are needed'): save_folder(net, tmp_path/'a', 'somebody')
    assert not list(tmp_path.iterdir())
def test_no_config_known(net, tmp_path):
    fails(lambda: save_folder(net, tmp_path/'a', [Row('', '')]), 'no config.json is known for HubToy as rows: use save_single')

# --- single files ---
def test_single(net, tmp_path):
    save_single(net, tmp_path/'a.safetensors', 'somebody', 'model.diffusion_model')
    assert all(k.startswith('model.diffusion_model.') for k in load_file(tmp_path/'a.safetensors'))
    with Hollow(): other = hub_toy()
    load_single(other, tmp_path/'a.safetensors', dtype=torch.float64)
    assert other.out.weight.dtype==torch.float64
    with Hollow(): other = hub_toy()
    r = load_single(other, tmp_path/'a.safetensors')
    assert alike(bits(net), bits(other)) and r.layout=='hub_toy_somebody under model.diffusion_model'
    fails(lambda: load_single(other, tmp_path/'b.safetensors'), 'is not there', error=FileNotFoundError)
    fails(lambda: load_single(hub_toy(d=6), tmp_path/'a.safetensors'), 'a.safetensors', 'blocks.0.qkv.weight has shape (12, 4) and should have (18, 6) (from model.diffusion_model.layers.0.q.weight and 2 more)')
    f = tmp_path/'a.safetensors'
    f.write_bytes(f.read_bytes()[:-9])
    fails(lambda: load_single(other, f), 'a.safetensors: not a whole', error=Damaged)

@pytest.mark.parametrize('wrap', [lambda s: s, lambda s: {'state_dict': s, 'epoch': 3, 'best': torch.tensor(.1)}, lambda s: {'a': {'model': s}, 'opt': {'state': {0: {'m': torch.zeros(1)}}}},
                                  lambda s: {'model': {'module.'+k: t for k,t in s.items()}}])
def test_pickle(net, tmp_path, wrap):
    torch.save(wrap(dump_state(net, 'somebody')), tmp_path/'a.pt')
    other = hub_toy()
    load_single(other, tmp_path/'a.pt')
    assert alike(bits(net), bits(other))
def test_pickle_parts(net, tmp_path):
    a, b = bits(net), {k: t+1 for k,t in bits(net).items()}
    torch.save(dict(model=a, ema=b, opt={}), tmp_path/'a.pt')
    other = hub_toy()
    fails(lambda: load_single(other, tmp_path/'a.pt'), "a.pt holds 'model', 'ema': say which as part=")
    fails(lambda: load_single(other, tmp_path/'a.pt', part='emma'), "no part 'emma' (did you mean 'ema'?)")
    load_single(other, tmp_path/'a.pt', part='ema')
    assert alike(b, bits(other))
    torch.save([1, 2], tmp_path/'b.pt')
    fails(lambda: load_single(other, tmp_path/'b.pt'), 'b.pt holds no tensors by name')
    assert sets_in({'x': {1: torch.zeros(1)}})=={} and sets_in(torch.zeros(1))=={}

class Bomb:
    def __init__(self, path): self.path = path
    def __reduce__(self): return open, (self.path, 'w')
def test_pickle_runs_nothing(net, tmp_path):
    import argparse
    torch.save(dict(model=bits(net), x=Bomb(str(tmp_path/'ran'))), tmp_path/'a.ckpt')
    fails(lambda: load_single(net, tmp_path/'a.ckpt'), 'a.ckpt holds objects besides tensors', 'weights_only=False', 'safetensors')
    assert not (tmp_path/'ran').exists()
    torch.save(dict(model=bits(net), args=argparse.Namespace(lr=1)), tmp_path/'b.ckpt')
    fails(lambda: load_single(net, tmp_path/'b.ckpt'), 'besides tensors (argparse.Namespace)')
@pytest.mark.parametrize('keep', [0, 5, -50])
def test_truncated_pickle(net, tmp_path, keep):
    torch.save(bits(net), tmp_path/'a.pt')
    (tmp_path/'a.pt').write_bytes((tmp_path/'a.pt').read_bytes()[:keep])
    fails(lambda: open_pickle(tmp_path/'a.pt'), 'a.pt', error=Damaged)

# --- by name ---
@pytest.fixture
def cache(folder, tmp_path, monkeypatch):
    "A cache in the hub's own form, and no network."
    from huggingface_hub import constants
    rev = 'c'*40
    repo = tmp_path/'cache'/'models--some--net'
    (repo/'refs').mkdir(parents=True); (repo/'refs'/'main').write_text(rev); (repo/'blobs').mkdir()
    (repo/'snapshots'/rev/'unet').mkdir(parents=True)
    for f in folder.iterdir(): # links, as there
        shutil.copy(f, repo/'blobs'/f.name)
        (repo/'snapshots'/rev/'unet'/f.name).symlink_to(repo/'blobs'/f.name)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path/'cache'))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    return repo/'snapshots'/rev
def test_by_name(net, cache):
    assert alike(bits(net), bits(load_folder('some/net', 'unet'))) and alike(bits(net), bits(load_folder(cache, 'unet')))
    fails(lambda: load_folder('some/net'), 'some/net has no config.json', error=FileNotFoundError)
    fails(lambda: load_folder('other/net'), 'other/net', error=FileNotFoundError)
    fails(lambda: load_folder('no/such/folder'), 'no/such/folder is not there', error=FileNotFoundError)

# --- the other library ---
def test_diffusers_opens(net, folder, tmp_path):
    "A folder that we wrote opens in diffusers, and one that diffusers wrote, in shards, opens here."
    from diffusers import ConfigMixin, ModelMixin
    from diffusers.configuration_utils import register_to_config
    class HubToyModel(ModelMixin, ConfigMixin):
        @register_to_config
        def __init__(self, width=2, num_layers=1, activation='gelu'):
            super().__init__()
            self.layers = nn.ModuleList(nn.ModuleDict({**{o: nn.Linear(width, width) for o in 'qkv'}, 'proj': nn.Linear(width, width)}) for _ in range(num_layers))
            self.emb = nn.ModuleDict(dict(a=nn.Embedding(2*width, width), b=nn.Embedding(2*width, width)))
            self.head = nn.Linear(width, 2*width)
            self.register_buffer('steps', torch.tensor(0)); self.register_buffer('table', torch.zeros(width, dtype=torch.float64))
    for path in (folder, tmp_path/'one'):
        if path!=folder: save_folder(net, path, 'somebody')
        other, info = HubToyModel.from_pretrained(path, output_loading_info=True)
        assert not info['missing_keys'] and not info['unexpected_keys'] and alike(dict(other.state_dict()), dump_state(net, 'somebody'))
    other.save_pretrained(tmp_path/'back', max_shard_size=300)
    assert len(list((tmp_path/'back').glob('*.safetensors')))>2 and alike(bits(net), bits(load_folder(tmp_path/'back')))

# --- every layout ---
def own(f): return inspect.unwrap(f).__module__.startswith('diffnb.')
def refused(f):
    "Does it say, by a ValueError, that this network has no such form?"
    try: f()
    except ValueError: return True
    except Exception: pass # the test shall see it
    return False
VARIANTS = {'mamba2_tiny': [{}, dict(mixer='causal', time=0)], 'bert_tiny': [{}, dict(transform=False)]} # what others have of them
def tiny():
    "The tiny networks and codecs of the package and those of their parts that somebody keeps apart, with each layout and config that takes them."
    for kind in ('denoiser', 'codec'):
        for n,f in presets(kind).items():
            if not (own(f) and n.endswith('_tiny')): continue
            for kw in VARIANTS.get(n, [{}]):
                with Hollow(): net = f(**kw)
                for m in {type(m): m for m in reversed(list(net.modules()))}.values():
                    cls = type(m).__name__
                    def make(f=f, kw=kw, cls=cls): return next(m for m in f(**kw).modules() if type(m).__name__==cls)
                    for l,g in layouts_of(m).items():
                        if not (own(g) if g else m is net) or refused(lambda: plan(m, rows_of(m, l)[1])): continue
                        configs = [c for c,h in presets('config').items() if own(h) and (h.facts['model'], h.facts['layout'])==(cls, l)]
                        yield '-'.join([n, *kw, cls]), make, l, [c for c in configs if not refused(lambda: presets('config')[c]().theirs(m))]
TINY = list(tiny())
LAYOUTS = [pytest.param(make, l, id=f'{n}-{l}') for n,make,l,_ in TINY]
CONFIGS = [pytest.param(make, c, id=f'{n}-{c}') for n,make,_,cs in TINY for c in cs]
@pytest.mark.parametrize('make, layout', LAYOUTS)
def test_layout(make, layout):
    "Every tensor of ours once, none of theirs twice; ours to theirs to ours is exact, also for a network without memory."
    net = randomise(make())
    moves = plan(net, rows_of(net, layout)[1])
    mine = [k for m in moves for k in m.ours]
    assert len(mine)==len(set(mine)) and set(mine)=={v[0] for v in layouts.own_names(net).values()}
    theirs = dump_state(net, layout)
    r = compare(net, theirs, layout)
    assert not r.faults() and all(any(k==row.theirs[0] for row in rows_of(net, layout)[1]) for k in r.ignored)
    assert len({t.untyped_storage().data_ptr() for t in theirs.values() if t.numel()})==sum(t.numel()>0 for t in theirs.values())
    with Hollow(): hollow = make()
    for other in (randomise(make(), 1), hollow):
        load_state(other, theirs, layout)
        assert alike(bits(net), bits(other))
    assert find_layout(net, theirs)==layout or alike(dump_state(net, find_layout(net, theirs)), theirs) # found by its names

@pytest.mark.parametrize('what, tested', [('layout', {o[2] for o in TINY}), ('config', {c for o in TINY for c in o[3]})])
def test_all_are_tested(what, tested):
    "There is a tiny network, or part of one, for each layout and each config."
    assert not [n for n,f in presets(what).items() if own(f) and n not in tested]

@pytest.mark.parametrize('make, config', CONFIGS)
def test_config(make, config, tmp_path):
    "A folder in somebody's form says enough to make the network again."
    f = presets('config')[config]
    net = randomise(make())
    check_plain(f().theirs(net))
    save_folder(net, tmp_path/'a', f.facts['layout'])
    other = load_folder(tmp_path/'a')
    assert type(other) is type(net) and alike(bits(net), bits(other)) and hasattr(other, 'preset')
@pytest.mark.parametrize('make, config', CONFIGS)
def test_reference_opens(make, config, tmp_path):
    "The library whose class it is opens our folder, finds each tensor and no other; what it writes, in shards, comes back to the bit."
    import diffusers, transformers
    f = presets('config')[config]
    their = getattr(diffusers, f.facts['cls'], None) or getattr(transformers, f.facts['cls'])
    net = randomise(make())
    save_folder(net, tmp_path/'a', f.facts['layout'], size=10**5)
    other, info = their.from_pretrained(tmp_path/'a', output_loading_info=True)
    missing = [k for k in info.get('missing_keys', []) if not k.startswith('pooler.')] # BERT's, which ours has no use for
    assert not missing and not any(info.get(k) for k in ('unexpected_keys', 'mismatched_keys', 'error_msgs')), info
    other.save_pretrained(tmp_path/'back', max_shard_size=10**5)
    assert alike(bits(net), bits(load_folder(tmp_path/'back')))

def test_config_facts():
    for n,f in presets('config').items():
        if own(f): assert f.facts['layout'] in presets('layout') and presets('layout')[f.facts['layout']].facts['model']==f.facts['model']
