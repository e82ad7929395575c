"Textual inversion and DreamBooth: what moves and what does not, the prior's share, files as diffusers has them, and the commands."
import copy, json
from functools import partial
from pathlib import Path
import numpy as np
import pytest, torch
pytest.importorskip('diffusers'); pytest.importorskip('transformers')
import diffusers, folders
from PIL import Image
from safetensors.torch import load_file, save_file
from diffnb.cli import main
from diffnb.conditioners.cache import Cached
from diffnb.core import create, mean_loss
from diffnb.data.images import batches
from diffnb.hub import load_folder
from diffnb.hub.pipelines import load_pipeline, pipeline_text
from diffnb.process.gaussian import Gaussian
from diffnb.rng import Rng
from diffnb.store import load_tensors
from diffnb.train.loop import fit
from diffnb.train.personal import Word, Worded, in_turn, load_word, near, new_word, read_word, save_word, subject, texts_of
from diffnb.train.task import DiffusionTask, adamw, constant

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "Tiny pipelines, pictures of a thing, and of its kind."
    root = tmp_path_factory.mktemp('personal')
    folders.sd(root/'sd'); folders.xl(root/'xl'); folders.flux(root/'flux')
    g = np.random.default_rng(0)
    for name,n in dict(it=3, kind=5).items():
        (root/name).mkdir()
        for i in range(n): Image.fromarray(g.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(root/name/f'{i}.png')
    return root

def worded(path, token='<it>', like='a', k=1):
    inner = pipeline_text(str(path))
    return Worded(inner, token, [near(t, like, k) for t in texts_of(inner)])
def state(*nets): return {f'{i}.{k}': v.clone() for i,n in enumerate(nets) for k,v in n.state_dict().items()}
def moved(a, b): return [k for k in a if not torch.equal(a[k], b[k])]

# --- a word ---
@pytest.mark.parametrize('kind,k', [('sd', 1), ('sd', 3), ('xl', 2), ('flux', 2)])
def test_a_word_changes_nothing_else(made, kind, k):
    "Texts without it read as before, to the bit; with it otherwise; all encoders have it."
    before, now = pipeline_text(str(made/kind)), worded(made/kind, k=k)
    said = ['red cube', '', 'at be']
    a, b = before({'text': [*said, None]}), now({'text': [*said, None]})
    assert all(torch.equal(v, b[n]) for n,v in a.items())
    for t in texts_of(now):
        word = t.net.get_input_embeddings()
        assert isinstance(word, Word) and word.rows.weight.shape[0]==k
        word.rows.weight.data.normal_()
    assert all(torch.equal(v, now({'text': [*said, None]})[n]) for n,v in a.items())
    c, d = before({'text': ['red a']}), now({'text': ['red <it>']})
    assert any((v-d[n]).abs().max()>1e-3 for n,v in c.items())

def test_it_starts_as_the_word_that_comes_near(made):
    t = texts_of(now := worded(made/'sd', like='cube'))[0]
    old = t.net.get_input_embeddings().table.weight[t.tokenizer('cube', add_special_tokens=False)['input_ids'][0]]
    assert torch.equal(now.rows()[0].weight[0], old)

def test_exactly_one_row_is_trained(made):
    "After steps with weight decay, all of the network and the encoder is what it was, but for the rows; the checkpoint holds them alone."
    pipe, now = load_pipeline(made/'sd'), worded(made/'sd', k=2)
    now.requires_grad_(False)
    for w in now.words: w.rows.requires_grad_(True)
    net = create('sd_unet_tiny', ch=3, size=16).requires_grad_(False)
    t = DiffusionTask(net, pipe.process, None, now, optimiser=adamw(.5), lr=constant(1e-2), alone=now.rows())
    ds = subject(made/'it', ['a <it>', 'red <it>'])
    was = state(now, net)
    run = fit(t, partial(batches, ds, 2, Rng(0)), 2, made/'run', averages={}, bar=False)
    same = moved(was, state(now, net))
    assert len(same)==1 and same[0].endswith('rows.weight')
    assert (run.task.net[0].weight-was[same[0]]).abs().min(1).values.max()>0 # both rows
    saved = load_tensors(made/'run'/'step-00000002'/'model.safetensors')[0]
    assert [tuple(v.shape) for v in saved.values()]==[(2, 24)] and torch.equal(saved['0.weight'], now.rows()[0].weight)

def test_what_is_refused(made, tmp_path):
    inner = pipeline_text(str(made/'sd'))
    with pytest.raises(ValueError, match='take a word of one'): near(texts_of(inner)[0], 'xyz', 2)
    with pytest.raises(ValueError, match="has 'cube</w>' already"): Worded(inner, 'cube</w>', [torch.zeros(1, 24)])
    with pytest.raises(ValueError, match="is another's"): Worded(inner, '<it>', [torch.zeros(1, 23)])
    with pytest.raises(ValueError, match='is no word'): Worded(inner, '<i t>', [torch.zeros(1, 24)])
    with pytest.raises(ValueError, match='rows for 2 encoders'): Worded(inner, '<it>', [torch.zeros(1, 24)]*2)
    with pytest.raises(ValueError, match='without a cache'): Worded(Cached(inner, tmp_path/'c'), '<it>', [torch.zeros(1, 24)])
    with pytest.raises(ValueError, match='give like='): new_word('<it>', path=str(made/'sd'))
    assert inner.tokenizer.convert_tokens_to_ids('<it>')==inner.tokenizer.unk_token_id # nothing was changed

# --- files ---
@pytest.mark.parametrize('k', [1, 3])
def test_diffusers_reads_ours(made, tmp_path, k):
    "Their encoder with our file says what ours says, also of a word of several tokens."
    now = worded(made/'sd', k=k)
    now.rows()[0].weight.data.normal_(generator=torch.Generator().manual_seed(0))
    save_word(now, tmp_path/'learned_embeds.safetensors')
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(made/'sd')
    pipe.load_textual_inversion(str(tmp_path))
    said = ['red <it>', 'a cat']
    with torch.no_grad():
        ids = pipe.tokenizer([pipe.maybe_convert_prompt(o, pipe.tokenizer) for o in said], padding='max_length', truncation=True, max_length=12, return_tensors='pt').input_ids
        want = pipe.text_encoder(ids)[0]
        got = now({'text': said})['ctx']
    assert (got-want).abs().max()<1e-5
    token, rows = read_word(tmp_path)
    assert token=='<it>' and torch.equal(rows[0], now.rows()[0].weight)

def test_we_read_theirs(made, tmp_path):
    "One vector without an axis, the web UI's two forms, and two encoders."
    row = torch.randn(24, generator=torch.Generator().manual_seed(1))
    save_file({'<cat>': row}, tmp_path/'a.safetensors'); save_file({'emb_params': row[None]}, tmp_path/'b.safetensors')
    torch.save({'string_to_param': {'*': row[None]}, 'name': 'cat', 'step': 5}, tmp_path/'c.pt')
    torch.save({'<cat>': row}, tmp_path/'d.bin')
    for f,token,name in (('a.safetensors', None, '<cat>'), ('b.safetensors', '<b>', '<b>'), ('c.pt', None, 'cat'), ('d.bin', None, '<cat>')):
        got, rows = read_word(tmp_path/f, token)
        assert got==name and torch.equal(rows[0], row[None])
    one = load_word(pipeline_text(str(made/'sd')), tmp_path/'a.safetensors')
    assert not any(p.requires_grad for p in one.parameters())
    with pytest.raises(ValueError, match='give token='): read_word(tmp_path/'b.safetensors')
    save_file({'x': row, 'y': row.clone()}, tmp_path/'e.safetensors')
    with pytest.raises(ValueError, match='is no word'): read_word(tmp_path/'e.safetensors')
    with pytest.raises(FileNotFoundError): read_word(tmp_path)
    (tmp_path/'f.safetensors').write_bytes(b'no')
    with pytest.raises(ValueError, match='f.safetensors'): read_word(tmp_path/'f.safetensors')
    xl = worded(made/'xl')
    save_word(xl, tmp_path/'xl.safetensors')
    assert {k: tuple(v.shape) for k,v in load_file(tmp_path/'xl.safetensors').items()}=={'clip_l': (1, 24), 'clip_g': (1, 20)}
    again = load_word(pipeline_text(str(made/'xl')), tmp_path/'xl.safetensors', '<it>')
    assert all(torch.equal(v, again({'text': ['a <it>']})[k]) for k,v in xl({'text': ['a <it>']}).items())

def test_two_words(made):
    "A second word leaves the first as it is."
    one = worded(made/'sd', '<one>', 'cube', 2)
    said = one({'text': ['red <one>']})['ctx']
    two = Worded(one, '<two>', [near(t, 'a', 1) for t in texts_of(one)])
    assert torch.equal(two({'text': ['red <one>']})['ctx'], said)
    two.words[0].rows.weight.data.normal_()
    assert torch.equal(two({'text': ['red <one>']})['ctx'], said) and not torch.equal(two({'text': ['red <two>']})['ctx'], said)

# --- the prior ---
def both(made, weight, b=4):
    ds = subject(made/'it', 'a <it>', made/'kind', 'a cube')
    return next(in_turn(ds, b, Rng(0), weight=weight))

def test_the_prior_term(made):
    "The mean over the batch is the sum of the two means, the kind's with its weight; so are the gradients."
    torch.manual_seed(0)
    net = create('sd_unet_tiny', ch=3, size=16)
    t = DiffusionTask(net, Gaussian('scaled_linear', 'eps'), None, worded(made/'sd').requires_grad_(False))
    def step(batch):
        net.zero_grad()
        loss = mean_loss(t.loss(batch, Rng(1)))
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in net.parameters()])
    def part(batch, rows): # alone, with the same times and noise
        cond = {'text': [batch['cond']['text'][i] for i in rows]}
        return {**{k: v[rows] for k,v in batch.items() if torch.is_tensor(v) and k!='weight'}, 'cond': cond}
    batch = both(made, .3)
    assert batch['cond']['text']==['a <it>', 'a cube']*2 and batch['weight'].tolist()==pytest.approx([2, .6]*2)
    (l, g), (li, gi), (lk, gk) = step(batch), step(part(batch, [0, 2])), step(part(batch, [1, 3]))
    assert l==pytest.approx(li+.3*lk, rel=1e-5) and (g-gi-.3*gk).abs().max()<1e-5*g.abs().max()
    assert gk.abs().max()>1e-3*gi.abs().max() # the kind has a say
    l0, g0 = step(both(made, 0.))
    assert l0==pytest.approx(li, rel=1e-5) and (g0-gi).abs().max()<1e-5*gi.abs().max()

def test_half_and_half(made):
    "At every position on, and each picture of both in an epoch of its own."
    ds = subject(made/'it', 'a <it>', made/'kind', 'a cube')
    row = in_turn(ds, 2, Rng(0))
    seen = [b['sample'] for b,_ in zip(row, range(15))]
    assert all(s[0]<3<=s[1] for s in seen)
    its, kinds = ([int(s[i]) for s in seen] for i in (0, 1))
    assert all(sorted(its[i:i+3])==[0, 1, 2] for i in range(0, 15, 3)) and all(sorted(kinds[i:i+5])==[3, 4, 5, 6, 7] for i in range(0, 15, 5))
    later = next(in_turn(ds, 2, Rng(0), start=8))
    assert torch.equal(later['sample'], seen[4]) and later['idx'].tolist()==[8, 9]

def test_a_prior_keeps_the_kind(made):
    "What the network does for its kind moves less with a prior that shows it than without."
    torch.manual_seed(0)
    first = create('sd_unet_tiny', ch=3, size=16)
    reader, p = worded(made/'sd').requires_grad_(False), Gaussian('scaled_linear', 'v')
    ds = subject(made/'it', 'a <it>', made/'kind', 'a cube')
    kind = ds.take(ds.labels==1)
    def loss(net): # on the kind
        t = DiffusionTask(net, p, None, reader)
        with torch.no_grad(): return mean_loss(t.loss(next(batches(kind, 40, Rng(9))), Rng(3))).item()
    def trained(weight):
        t = DiffusionTask(copy.deepcopy(first), p, None, reader, lr=constant(5e-3))
        fit(t, partial(in_turn, ds, 4, Rng(0), weight=weight), 25, averages={}, bar=False)
        return t.denoiser
    assert loss(trained(1.))<loss(trained(0.))

def test_pictures_and_texts(made, tmp_path):
    ds = subject(made/'it', ['a <it>', 'red <it>'])
    assert len(ds)==6 and ds.captions.count('red <it>')==3 and ds.classes==['it'] and torch.equal(ds.pixels[torch.tensor([0])], ds.pixels[torch.tensor([3])])
    x = np.zeros((2, 16, 16, 3), np.uint8)
    np.savez(tmp_path/'k.npz', x=x, text=['one', 'two']); np.savez(tmp_path/'n.npz', x=x)
    assert subject(made/'it', prior=tmp_path/'k.npz').captions[3:]==['one', 'two']
    with pytest.raises(ValueError, match='give its texts'): subject(made/'it', prior=tmp_path/'n.npz')
    np.savez(tmp_path/'b.npz', x=np.zeros((2, 8, 8, 3), np.uint8), text=['one', 'two'])
    with pytest.raises(ValueError, match='give size='): subject(made/'it', prior=tmp_path/'b.npz')
    assert subject(made/'it', prior=tmp_path/'b.npz', size=8).shape==(3, 8, 8)
    with pytest.raises(ValueError, match='at least 0'): subject(made/'it', weight=-1.)

# --- the commands ---
def ask(words, capsys):
    capsys.readouterr()
    code = main(list(map(str, words)))
    return code, *capsys.readouterr()

def drawn(words, capsys):
    code, _, err = ask(['sample', *words, '--out', 'x.npz'], capsys)
    assert code==0, err
    with np.load('x.npz') as z: return z['x']

@pytest.fixture
def keys(made, tmp_path, monkeypatch):
    "A tiny folder in place of Stable Diffusion's, for the recipes as they ship."
    monkeypatch.chdir(tmp_path)
    net = load_folder(made/'sd', 'unet').preset
    over = {'weights': made/'sd', 'model': json.dumps({'name': net['name'], **net['kw'], 'size': 8}), 'codec.path': made/'sd', 'conditioner.path': made/'sd', 'data.set.path': made/'it',
            'data.set.size': 16, 'train.steps': 4, 'train.log_every': 2, 'sample.n': 2, 'sample.steps': 2}
    return [f'--{k}={v}' for k,v in over.items()]

PERSONAL = dict(textual_inversion=['--conditioner.like=cube', '--data.set.says=[a <it>, red <it>]', '--train.lr={name: constant, lr: 0.3}'],
                dreambooth=['--data.set.prior=MADE/kind', '--data.set.says=a cube', '--data.set.prior_says=a red cube', '--train.lr={name: constant, lr: 1.0e-2}'])
def at(made, words): return [o.replace('MADE', str(made)) for o in words]
@pytest.mark.parametrize('name', PERSONAL)
def test_train_and_draw(name, made, keys, tmp_path, capsys):
    "The recipe that ships, in four steps on a tiny folder: it goes on bit for bit, leaves what it should, and what it learnt shows."
    more = [*keys, *at(made, PERSONAL[name])]
    def train(out, *last):
        code, _, err = ask(['train', name, '--out', out, *more, *last], capsys)
        assert code==0, err
    slow = ['--train.averages={slow: {name: halflife, images: 8}}', '--sample.average=slow']
    train('whole'); train('two', '--train.steps=2', *slow); train('two', *slow)
    a, b = (load_tensors(tmp_path/o/'step-00000004'/'model.safetensors')[0] for o in ('whole', 'two'))
    assert a.keys()==b.keys() and all(torch.equal(v, b[k]) for k,v in a.items())
    train('none', '--train.lr={name: constant, lr: 0.0}')
    net = load_folder(made/'sd', 'unet').state_dict()
    if name=='textual_inversion':
        assert [tuple(v.shape) for v in a.values()]==[(1, 24)]
        assert torch.equal(read_word(tmp_path/'whole')[1][0], next(iter(a.values()))) and read_word(tmp_path/'whole')[0]=='<it>'
        mean = load_tensors(tmp_path/'two'/'step-00000004'/'ema-slow.safetensors')[0] # what it samples with is what it leaves
        assert torch.equal(read_word(tmp_path/'two')[1][0], next(iter(mean.values()))) and not torch.equal(next(iter(mean.values())), next(iter(a.values())))
        assert (drawn(['whole', '--prompt', 'a <it>'], capsys)!=drawn(['none', '--prompt', 'a <it>'], capsys)).any()
        assert (drawn(['whole', '--prompt', 'a cube'], capsys)==drawn(['none', '--prompt', 'a cube'], capsys)).all() # all else is as it was
        assert (drawn(['none', '--prompt', 'a <it>'], capsys)==drawn(['none', '--prompt', 'a cube'], capsys)).all() # it starts there
    else:
        assert a.keys()==net.keys() and all((v!=net[k]).any() for k,v in a.items() if v.ndim>1)
        assert (drawn(['whole', '--prompt', 'a cube'], capsys)!=drawn(['none', '--prompt', 'a cube'], capsys)).any()

def test_dreambooth_by_an_adapter(made, keys, capsys):
    "With LoRA in place of all weights."
    code, _, err = ask(['finetune', 'dreambooth', '--base', made/'sd', '--out', 'run', *keys[1:], *at(made, PERSONAL['dreambooth'])], capsys)
    assert code==0, err
    on, off = (drawn([made/'sd', '--adapter', 'run', '--adapter-scale', s, '--prompt', 'a cube'], capsys) for s in (1, 0))
    assert (on!=off).any()

KIND = ['--data.set.prior=MADE/kind', '--data.set.prior_says=a']
WRONG = {'textual_inversion needs a word': ['textual_inversion', '--conditioner={name: pipeline_text, path: MADE/sd}'], 'take a word of one': ['textual_inversion', '--conditioner.like=zzz'],
         "has 'cube</w>' already": ['textual_inversion', '--conditioner.like=cube', '--conditioner.token=cube</w>'], 'is odd': ['dreambooth', '--train.batch=3', *KIND],
         'dreambooth needs data.set': ['dreambooth', '--data.set={name: emoji}'], 'at least 0': ['dreambooth', '--data.set.weight=-1', *KIND]}
@pytest.mark.parametrize('why', WRONG)
def test_mistakes(why, made, keys, capsys):
    name, *words = WRONG[why]
    code, _, err = ask(['train', name, *keys, *at(made, words)], capsys)
    assert code==2 and why in err and len(err.strip().splitlines())==1 and not Path('runs').exists(), err
