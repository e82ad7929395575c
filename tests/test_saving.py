"Networks in folders: what is saved comes back, and what does not fit is said, key by key."
import json
import pytest
import torch
from torch import nn
from diffnb.core import Denoiser, Feats, create, preset
from diffnb.saving import load, load_into, save
from diffnb.store import Damaged, load_json, load_tensors, save_json, save_tensors, write_folder

class Net(Denoiser):
    def __init__(self, vocab, d, tied):
        super().__init__()
        self.emb, self.out = nn.Embedding(vocab, d), nn.Linear(d, vocab)
        if tied: self.out.weight = self.emb.weight
        self.register_buffer('count', torch.tensor(3))
        self.register_buffer('hidden', torch.zeros(2), persistent=False)
    def features(self, x, net_t, **cond): return Feats(self.emb(x))
    def head(self, feats): return self.out(feats.h)

@preset('denoiser')
def saving_toy(vocab=11, d=4, tied=True, sizes=(1, 2)): return Net(vocab, d, tied)

def rewrite(folder, new=None, tensors=None, **changes):
    "The same checkpoint with another config or other tensors, sealed anew."
    config, (old, _) = load_json(folder/'config.json'), load_tensors(folder/'model.safetensors')
    with write_folder(folder) as d:
        save_json(d/'config.json', config | changes if new is None else new)
        save_tensors(d/'model.safetensors', old if tensors is None else tensors)

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize('tied', [True, False])
def test_round_trip(tmp_path, dtype, tied):
    net = create('saving_toy', d=6, tied=tied, sizes=(3, 4)).to(dtype)
    net.count += 4
    save(net, tmp_path/'net')
    back = load(tmp_path/'net')
    a, b = net.state_dict(), back.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)
    assert (back.out.weight is back.emb.weight) == tied and back.count == 7 and back.hidden.dtype == torch.float32
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in back.parameters())
    assert sorted(p.name for p in (tmp_path/'net').iterdir()) == ['config.json', 'manifest.json', 'model.safetensors']
    save(back, tmp_path/'again')
    for f in ('config.json', 'model.safetensors', 'manifest.json'):
        assert (tmp_path/'again'/f).read_bytes() == (tmp_path/'net'/f).read_bytes()

def test_mixed_dtypes_come_back(tmp_path):
    net = create('saving_toy', tied=False)
    net.out.half()
    save(net, tmp_path/'net')
    back = load(tmp_path/'net')
    assert (back.out.weight.dtype, back.emb.weight.dtype) == (torch.float16, torch.float32)

def test_nothing_importable_is_named(tmp_path):
    save(create('saving_toy'), tmp_path/'net')
    assert load_json(tmp_path/'net'/'config.json') == dict(format=1, kind='denoiser', name='saving_toy', kw={})
    for name, kw in (('os.system', {}), ('torch.nn.Linear', {'in_features': 1, 'out_features': 1}), ('saving_to', {}), (['a'], {}),
                     ('saving_toy', {'dim': 3}), ('saving_toy', {'kind': 'denoiser'}), ('saving_toy', {'name': 'x'})):
        rewrite(tmp_path/'net', name=name, kw=kw)
        with pytest.raises(Exception, match='config.json|hint|type'): load(tmp_path/'net')
    rewrite(tmp_path/'net', name='saving_toi', kw={})
    with pytest.raises(ValueError, match="config.json.*did you mean 'saving_toy'"): load(tmp_path/'net')

@pytest.mark.parametrize('config', [[], 3, {}, {'format': 1}, dict(format=2, kind='denoiser', name='saving_toy', kw={}),
                                    dict(format=1, kind='denoiser', name='saving_toy', kw={}, more=1)], ids=str)
def test_other_configurations(tmp_path, config):
    save(create('saving_toy'), tmp_path/'net')
    rewrite(tmp_path/'net', config)
    with pytest.raises(Damaged, match='config.json'): load(tmp_path/'net')

def test_what_cannot_be_saved(tmp_path):
    save(create('saving_toy'), tmp_path/'net')
    with pytest.raises(TypeError, match='no preset made this Net'): save(Net(3, 3, True), tmp_path/'net')
    net = create('saving_toy')
    net.preset['kw']['sizes'] = print
    with pytest.raises(TypeError, match='saving_toy.kw.sizes'): save(net, tmp_path/'net')
    net.preset['kw']['sizes'] = [float('nan')]
    with pytest.raises(ValueError, match='sizes'): save(net, tmp_path/'net')
    assert load(tmp_path/'net') and len(list(tmp_path.iterdir())) == 1

def test_damage_is_found(tmp_path):
    save(create('saving_toy'), tmp_path/'net')
    f = tmp_path/'net'/'model.safetensors'
    raw = f.read_bytes()
    f.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(Damaged, match='model.safetensors has other content'): load(tmp_path/'net')
    f.unlink()
    with pytest.raises(Damaged, match='model.safetensors'): load(tmp_path/'net')
    with pytest.raises(Damaged, match='not there'): load(tmp_path/'none')

def test_only_listed_files_are_read(tmp_path):
    save(create('saving_toy'), tmp_path/'net')
    m = load_json(tmp_path/'net'/'manifest.json')
    m['files'] = [f for f in m['files'] if f['name'] != 'model.safetensors']
    (tmp_path/'net'/'manifest.json').write_text(json.dumps(m))
    with pytest.raises(Damaged, match='lists no model.safetensors'): load(tmp_path/'net')

def fits(**changes):
    "The state of a toy with some keys changed, or removed by None."
    s = {**create('saving_toy', tied=False).state_dict(), **changes}
    return {k: v for k, v in s.items() if v is not None}

MISFITS = {
    'emb.weight is missing': dict(fits={'emb.weight': None}),
    "emb.wieght is unexpected (did you mean 'emb.weight'?)": dict(fits={'emb.wieght': torch.zeros(2), 'emb.weight': None}),
    'nothing.like.it is unexpected': dict(fits={'nothing.like.it': torch.zeros(2)}),
    'out.bias has shape (3,) and should have (11,)': dict(fits={'out.bias': torch.zeros(3)}),
    'out.bias is torch.float64 and should be torch.float32': dict(fits={'out.bias': torch.zeros(11).double()}),
    'count is torch.int32 and should be torch.int64': dict(fits={'count': torch.tensor(3, dtype=torch.int32)}),
}

@pytest.mark.parametrize('message', MISFITS)
def test_misfits_are_listed(message):
    net = create('saving_toy', tied=False)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(ValueError) as e: load_into(net, fits(**MISFITS[message]['fits']), 'here.safetensors')
    assert message in str(e.value) and str(e.value).startswith('here.safetensors does not fit Net: ')
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())  # nothing is filled by halves

def test_ties_must_agree():
    one, two = create('saving_toy', tied=True), create('saving_toy', tied=False)
    load_into(one, create('saving_toy', tied=True).state_dict(), 'x'); load_into(two, fits(), 'x')
    with pytest.raises(ValueError, match='out.weight is tied to emb.weight in the file only'): load_into(two, one.state_dict(), 'x')
    with pytest.raises(ValueError, match='out.weight is tied to emb.weight in the network only'): load_into(one, two.state_dict(), 'x')

def test_a_long_list_is_cut():
    with pytest.raises(ValueError, match=r'^[^;]*(;[^;]*){7} and 9 more$'):
        load_into(nn.Sequential(*(nn.LayerNorm(2, bias=False) for _ in range(17))), {}, 'x')

def test_other_kind_of_number_is_an_error(tmp_path):
    save(create('saving_toy'), tmp_path/'net')
    rewrite(tmp_path/'net', tensors={**load_tensors(tmp_path/'net'/'model.safetensors')[0], 'count': torch.tensor(3.)})
    with pytest.raises(ValueError, match='count is torch.float32 and should be torch.int64'): load(tmp_path/'net')
