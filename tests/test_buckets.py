"Buckets of one shape: any set of sizes, batches and starts; files; what XL is told, down to the loss."
import itertools, json
from functools import partial
import pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from diffnb.conditioners import Conditioner
from diffnb.core import create
from diffnb.data.buckets import Plan, anywhere, bucket_batches, bucket_sizes, cover, in_memory, mixed, nearest_size, size_of, to_bucket, used
from diffnb.data.files import BadImage, in_folder, in_zip
from diffnb.data.images import resize
from diffnb.process.gaussian import Gaussian
from diffnb.rng import Rng
from diffnb.train.loop import fit
from diffnb.train.task import DiffusionTask

def picture(h, w, seed=0): return torch.randint(256, (3, h, w), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
def some(k=23): return [picture(20+3*(i%7), 20+5*(i%5), i) for i in range(k)]
SHAPES = bucket_sizes(32*32, 8, 2)
def first(n, it): return list(itertools.islice(it, n))
def same(a, b):
    for k in ('x', 'idx', 'sample'): assert torch.equal(a[k], b[k])
    assert a['cond'].keys()==b['cond'].keys() and torch.equal(a['cond']['ids'], b['cond']['ids']) and a['cond'].get('text')==b['cond'].get('text')

@given(st.integers(1, 40), st.sampled_from([1, 8, 64]), st.floats(1, 4))
@settings(deadline=None, max_examples=60)
def test_shapes(a, unit, ratio):
    "Multiples of the unit, no larger than asked, one step longer would be; both ways round; the square where the unit divides it."
    a = a*unit
    got = bucket_sizes(a*a, unit, ratio)
    assert (a, a) in got and len(set(got))==len(got) and {(w, h) for h,w in got}==set(got)
    for h,w in got:
        assert h%unit==w%unit==0 and h*w<=a*a<min(h, w)*(max(h, w)+unit) and max(h, w)<=ratio*min(h, w)

@given(st.lists(st.tuples(st.integers(1, 500), st.integers(1, 500)), min_size=1, max_size=20))
@settings(deadline=None, max_examples=40)
def test_nearest_keeps_the_most(sizes):
    shapes = bucket_sizes(512**2, 64, 3)
    def kept(size, shape):
        r = size[0]/size[1]/(shape[0]/shape[1])
        return min(r, 1/r)
    for size,k in zip(sizes, nearest_size(sizes, shapes).tolist()): assert kept(size, shapes[k])>=max(kept(size, o) for o in shapes)-1e-9

@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(1, 9), st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_plan(kinds, batch, seed):
    "Any buckets, some empty: each step has one; each picture comes once in every epoch; by the end of one fewer than a batch a bucket is outstanding."
    kind, n = torch.tensor(kinds), len(kinds)
    plan = Plan(kind, batch, Rng(seed))
    steps = [plan.at(j) for j in range(plan.done(batch).sum())] # after so many epochs nothing is outstanding
    for k,idx in steps: assert len(idx)==batch and (kind[plan.sample(idx)]==k).all()
    idx = torch.cat([i for _,i in steps])
    assert torch.equal(idx.sort().values, torch.arange(batch*n))
    sample = plan.sample(idx)
    for e in range(batch): assert torch.equal(sample[idx//n==e].sort().values, torch.arange(n))
    for e in range(1, batch):
        till = int(plan.done(e).sum())
        short = e*plan.count-torch.tensor([k for k,_ in steps[:till]], dtype=torch.long).bincount(minlength=len(plan.count))*batch
        assert ((0<=short) & (short<batch)).all()

def test_epochs_differ_and_seeds_too():
    kind = torch.arange(600)%3
    def order(e, seed=0): return torch.cat([Plan(kind, 10, Rng(seed)).sample(Plan(kind, 10, Rng(seed)).at(j)[1]) for j in range(60*e, 60*(e+1))])
    def turns(e, seed=0): return [Plan(kind, 10, Rng(seed)).at(j)[0] for j in range(60*e, 60*(e+1))]
    assert not torch.equal(order(0), order(1)) and not torch.equal(order(0), order(0, 1)) and torch.equal(order(1), order(1))
    assert turns(0)!=turns(1) and turns(0)!=turns(0, 1) and sorted(turns(0))==sorted(turns(1))

def test_used():
    sizes = [(10, 10)]*9+[(10, 20)]*2+[(20, 10)]
    shapes = [(8, 16), (8, 8), (16, 8)]
    assert used(sizes, shapes, 2)==shapes[:2] and used(sizes, shapes, 3)==[(8, 8)]
    assert nearest_size(sizes, used(sizes, shapes, 3)).tolist()==[0]*12
    with pytest.raises(ValueError, match='the fullest 9'): used(sizes, shapes, 10)

@pytest.mark.parametrize('size', [(40, 30), (30, 41), (8, 64), (16, 16), (24, 40), (3, 200)])
@pytest.mark.parametrize('bucket', [(24, 40), (32, 32), (40, 24)])
def test_cut_is_told(size, bucket):
    "Nothing squeezed, and size, corner and target are what they are, mirrored or not."
    x, hw = picture(*size), cover(size, bucket)
    assert any(a==b for a,b in zip(hw, bucket)) and all(a>=b for a,b in zip(hw, bucket))
    s = max(b/o for o,b in zip(size, bucket))
    assert all(abs(a-s*o)<=.5 or a==b for a,o,b in zip(hw, size, bucket)) # rounded to a pixel
    corners = set()
    for i in range(12):
        y, ids = to_bucket(x, bucket, Rng(1).of([i]), anywhere, .5)
        (h, w, top, left, *target), whole = ids[0].tolist(), resize(x[None], hw)[0]
        assert (h, w)==size and tuple(target)==bucket
        ways = [o[:, top:top+bucket[0], left:left+bucket[1]] for o in (whole, whole.flip(-1))]
        assert any(torch.equal(y, o) for o in ways)
        corners.add((top, left))
    assert len(corners)>1 or sum(hw)-sum(bucket)<4

def test_mirrored_half_the_time():
    x = picture(32, 32)
    turned = [torch.equal(to_bucket(x, (32, 32), Rng(0).of([i]), p=.5)[0], x.flip(-1)) for i in range(200)]
    assert 70<sum(turned)<130 and not any(torch.equal(to_bucket(x, (32, 32), Rng(0).of([i]))[0], x.flip(-1)) for i in range(5))

@pytest.mark.parametrize('start', [0, 1, 4, 9, 25])
def test_entered_anywhere(start):
    "Across ends of epochs, with workers, by several processes."
    pics = in_memory(some(), text=[f'no {i}' for i in range(23)])
    make = partial(bucket_batches, pics, SHAPES, rng=Rng(3), place=anywhere, p=.5)
    long = first(start+3, make(batch_size=4))[start:]
    for a,b in zip(long, first(3, make(batch_size=4, start=4*start, workers=2 if start==9 else 0))): same(a, b)
    for one,*two in zip(long, *(first(3, make(batch_size=2, start=4*start, rank=r, world=2)) for r in (0, 1))):
        assert torch.equal(torch.cat([o['x'] for o in two]), one['x']) and sum((o['cond']['text'] for o in two), [])==one['cond']['text']
        assert [f'no {i}' for i in one['sample'].tolist()]==one['cond']['text']

@pytest.mark.parametrize('kw,why', [(dict(start=6), 'a step has 4 pictures'), (dict(start=-4), 'a step has 4'), (dict(batch_size=0), 'at least 1'), (dict(rank=2, world=2), 'rank=2 below'),
                                    (dict(start=4, world=2), 'a step has 8')])
def test_bad_arguments(kw, why):
    with pytest.raises(ValueError, match=why): bucket_batches(in_memory(some()), SHAPES, **{'batch_size': 4, 'rng': Rng(0), **kw})

def test_bad_sets():
    with pytest.raises(ValueError, match='has no pictures'): in_memory([])
    with pytest.raises(ValueError, match='22 y for 23'): in_memory(some(), y=torch.zeros(22, dtype=torch.long))

@pytest.fixture
def files(tmp_path):
    "Five photographs, one on its side, with captions."
    for i,(h,w) in enumerate([(30, 40), (40, 30), (20, 60), (50, 50)]): Image.fromarray(picture(h, w, i).permute(1, 2, 0).numpy()).save(tmp_path/f'{i}.png')
    exif = Image.Exif(); exif[0x0112] = 6
    Image.fromarray(picture(30, 60, 9).permute(1, 2, 0).numpy()).save(tmp_path/'side.jpg', exif=exif)
    rows = [json.dumps(dict(file_name=f'{n}', text=f'this is {n}')) for n in ('0.png', '1.png', '2.png', '3.png', 'side.jpg')]
    (tmp_path/'metadata.jsonl').write_text('\n'.join(rows))
    return tmp_path

def test_files(files, tmp_path_factory):
    "Sizes from headers are those of what is decoded, a picture on its side included; archives too."
    pics = mixed(in_folder(files), 'metadata.jsonl')
    assert pics.sizes==[(30, 40), (40, 30), (20, 60), (50, 50), (60, 30)]==[tuple(pics.read(i).shape[1:]) for i in range(5)]
    b = next(bucket_batches(pics, used(pics.sizes, SHAPES, 1), 2, Rng(0)))
    assert b['cond']['text']==['this is '+['0.png', '1.png', '2.png', '3.png', 'side.jpg'][i] for i in b['sample'].tolist()]
    assert b['cond']['ids'][:,:2].tolist()==[list(pics.sizes[i]) for i in b['sample'].tolist()]
    import shutil
    path = shutil.make_archive(str(tmp_path_factory.mktemp('z')/'pics'), 'zip', files)
    assert mixed(in_zip(path), 'metadata.jsonl').sizes==pics.sizes

def test_bad_files(files):
    (files/'4.png').write_bytes(b'\x89PNG no')
    with pytest.raises(BadImage, match='4.png cannot be read'): mixed(in_folder(files))
    (files/'4.png').unlink(); Image.new('RGB', (9, 9)).save(files/'more.png')
    with pytest.raises(ValueError, match='no caption for more.png'): mixed(in_folder(files), 'metadata.jsonl')
    with pytest.raises(BadImage, match='x cannot be read'): size_of(b'', 'x')
    (files/'cut.png').write_bytes((files/'0.png').read_bytes()[:200]) # a header and no more
    with pytest.raises(BadImage, match='cut.png cannot be read'): mixed(in_folder(files))

class Letters(Conditioner):
    "A vector for a text: how often each letter."
    def encode(self, said): return dict(ctx=torch.tensor([[[float(o.count(c)) for c in 'abcdefghijklmnopqrstuvwx']] for o in said]), vec=torch.zeros(len(said), 16))

def latent(batch, rng):
    "Pictures as small maps of four channels, as if by a codec."
    z = torch.nn.functional.avg_pool2d(batch['x'].float()/127.5-1, 4)
    return {**{k: v for k,v in batch.items() if k!='x'}, 'z': torch.cat([z, z.mean(1, keepdim=True)], 1)}

def task():
    torch.manual_seed(0)
    return DiffusionTask(create('sdxl_unet_tiny'), Gaussian('scaled_linear', 'v'), conditioner=Letters(), drop=.2)

def test_xl_trains_in_buckets(tmp_path):
    "Several shapes, text and six numbers; 6 = 3+3 bit for bit; and the network does read the numbers."
    pics = in_memory(some(), text=[f'no {i} of them' for i in range(23)])
    data = partial(bucket_batches, pics, SHAPES, 4, Rng(3), place=anywhere, p=.5, transforms=(latent,))
    assert len({b['z'].shape for b in first(6, data())})>1
    def go(n, folder=None): return fit(task(), data, n, folder, averages={}, bar=False)
    whole = go(6)
    for n in (3, 6): two = go(n, tmp_path/'run')
    assert whole.progress.images==24
    for k,v in whole.task.net.state_dict().items(): assert torch.equal(v, two.task.net.state_dict()[k]), k
    b, rng = next(data()), Rng(0)
    other = {**b, 'cond': {**b['cond'], 'ids': b['cond']['ids']+4}}
    assert not torch.equal(whole.task.loss(b, rng).value, whole.task.loss(other, rng).value)
