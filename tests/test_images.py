"Image data: the order, workers, transforms, augmentation, files and archives, and what is said when something is wrong."
import gzip, io, itertools, json, struct, tarfile, zipfile
from functools import partial
from pathlib import Path
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from diffnb.core import create, presets
from diffnb.data.augment import (MULTIPLIERS, affine, augment_labels, downsample, draw_augment, edm_augment, mirror,
                                 upsample, warp)
from diffnb.data.files import (BadImage, cifar10, decode, ffhq64, folder, imagenet, imagenette, in_zip, opened,
                               zip_file)
from diffnb.data.images import (Images, Stream, batches, center_crop, drop_label, emoji, fashion_mnist,
                                fashion_mnist_full, fit, floats, hflip, image_at, once, only, random_crop,
                                resize, to_float, to_uint8)
from diffnb.rng import Rng

def png(pixels, fmt='PNG', **kw):
    out = io.BytesIO()
    im = pixels if hasattr(pixels, 'save') else Image.fromarray(pixels)
    im.save(out, fmt, **kw)
    return out.getvalue()

def pictures(n, size=8, seed=0): return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), np.uint8)

@pytest.fixture(scope='module')
def garments(): return fashion_mnist()

@pytest.fixture
def tree(tmp_path):
    "Twelve pictures in three class folders."
    for i,p in enumerate(pictures(12)):
        f = tmp_path/'set'/'abc'[i%3]/f'{i:02}.png'
        f.parent.mkdir(parents=True, exist_ok=True); f.write_bytes(png(p))
    return tmp_path/'set'

def zipped(path, members):
    with zipfile.ZipFile(path, 'w') as z:
        for k,v in members: z.writestr(k, v)
    return path

# --- what ships ---
def test_embedded_sets():
    assert len(fashion_mnist())==6000 and len(fashion_mnist('test'))==1000 and fashion_mnist().shape==(1, 28, 28)
    for size in (32, 64):
        train, test, everything = (emoji(s, size) for s in ('train', 'test', 'all'))
        assert (len(train), len(test), len(everything))==(1706, 200, 1906) and train.shape==(3, size, size)
        assert not {train.name(i) for i in range(len(train))} & {test.name(i) for i in range(len(test))}
        assert len(train.captions)==len(train) and train.labels.max()<9
    a, b = emoji('test', 32), emoji('test', 64)                # one split for both sizes, and for ever
    assert a.captions==b.captions and a.captions[:2]==['clock face seven-thirty', 'basket']

def test_licences_ship():
    text = (Path(__file__).parents[1]/'diffnb/datasets/README.md').read_text()
    for f in (Path(__file__).parents[1]/'diffnb/datasets').glob('*.npz'): assert f.name in text
    for o in ('MIT', 'Apache-2.0', 'Zalando', 'Google'): assert o in text

def test_presets_exist():
    names = set(presets('dataset'))
    assert {'fashion_mnist', 'emoji', 'fashion_mnist_full', 'cifar10', 'imagenette', 'ffhq64', 'imagenet', 'folder', 'zip_file'}<=names
    assert len(create('fashion_mnist', kind='dataset', split='test'))==1000

# --- numbers and sizes ---
def test_bytes_round_trip():
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(every)), every) and to_float(every).min()==-1 and to_float(every).max()==1
    with pytest.raises(ValueError, match='NaN'): to_uint8(torch.tensor([float('nan')]))

@pytest.mark.parametrize('hw', [(37, 50), (64, 33), (20, 20)])
def test_resize_agrees_with_pillow(hw):
    im = Image.fromarray(pictures(1, 64)[0]).resize(hw[::-1], Image.BICUBIC)
    x = torch.from_numpy(np.array(im)).permute(2, 0, 1)[None]
    ours = resize(x, 16)
    want = np.array(im.resize(ours.shape[:-3:-1], Image.BICUBIC)).transpose(2, 0, 1)
    assert np.abs(ours[0].numpy().astype(int)-want).max()<=1 and min(ours.shape[-2:])==16
    assert fit(x, 16).shape[-2:]==(16, 16)

def test_center_crop_refuses_small():
    with pytest.raises(ValueError, match='resize first'): center_crop(torch.zeros(1, 3, 8, 9, dtype=torch.uint8), 9)

# --- the order ---
@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 40), seed=st.integers(0, 5), start=st.integers(0, 200))
def test_every_epoch_is_a_permutation(n, seed, start):
    p = torch.arange(5*n)
    i = image_at(p, n, Rng(seed)).view(5, n)
    assert torch.equal(i.sort(1).values, torch.arange(n).expand(5, n))
    assert torch.equal(image_at(p+start, n, Rng(seed))[:1], image_at(torch.tensor([start]), n, Rng(seed)))

def test_orders_differ(garments):
    a, b, c = (image_at(torch.arange(k*6000, (k+1)*6000), 6000, Rng(s)) for k,s in ((0, 0), (1, 0), (0, 1)))
    assert not torch.equal(a, b) and not torch.equal(a, c)

def test_nothing_is_read_to_skip():
    class Counting:
        shape, dtype, asked = (100, 1, 4, 4), torch.uint8, 0
        def __getitem__(self, i):
            Counting.asked += len(i)
            return torch.zeros(len(i), 1, 4, 4, dtype=torch.uint8)
    next(batches(Images(Counting()), 8, Rng(0), start=8*10**9))
    assert Counting.asked==8

TRANSFORMS = [hflip, partial(random_crop, size=28, pad=2), partial(drop_label, null=10), floats, partial(edm_augment, p=.3)]

def same(a, b):
    return torch.equal(a['x'], b['x']) and torch.equal(a['idx'], b['idx']) and torch.equal(a['sample'], b['sample']) \
        and all(torch.equal(a['cond'][k], b['cond'][k]) for k in a['cond'])

@pytest.mark.parametrize('workers', [1, 2])
def test_workers_change_nothing(garments, workers):
    small = garments.take(torch.arange(100))   # epochs end within the run
    one, two = (list(itertools.islice(batches(small, 32, Rng(1), start=32, workers=w, transforms=TRANSFORMS), 6)) for w in (0, workers))
    assert all(map(same, one, two))

def test_workers_leave_the_global_generator_alone(garments):
    torch.manual_seed(0); want = torch.rand(3)
    torch.manual_seed(0); next(batches(garments, 8, Rng(0), workers=1))
    assert torch.equal(torch.rand(3), want)

def test_resume_is_start(garments):
    whole = list(itertools.islice(batches(garments, 50, Rng(2), transforms=TRANSFORMS), 8))
    for k in (0, 3, 7): assert same(next(batches(garments, 50, Rng(2), start=50*k, transforms=TRANSFORMS)), whole[k])

def test_batches_draw_anew(garments):
    "Flips are keyed by the position in the row, so that they differ from batch to batch and from epoch to epoch."
    small = garments.take(torch.arange(40))
    def flipped(idx):
        b = Stream(small, Rng(0), [hflip])[idx]
        return (b['x']!=small.pixels[b['sample']]).flatten(1).any(1)[b['sample'].argsort()]
    a, b = (flipped(torch.arange(k*40, k*40+40)) for k in (0, 1))
    assert 5<(a!=b).sum()<35

def test_ranks_share_the_row(garments):
    whole = list(itertools.islice(batches(garments, 24, Rng(2)), 3))
    parts = [list(itertools.islice(batches(garments, 8, Rng(2), rank=r, world=3), 3)) for r in range(3)]
    for k in range(3): assert torch.equal(torch.cat([p[k]['x'] for p in parts]), whole[k]['x'])

@pytest.mark.parametrize('bad', [dict(batch_size=0), dict(start=-1), dict(rank=2, world=2)])
def test_bad_counts(garments, bad):
    with pytest.raises(ValueError, match='must be'): batches(garments, **{'batch_size': 4, 'rng': Rng(0), **bad})

def test_empty_set():
    with pytest.raises(ValueError, match='no images'): batches(Images(torch.zeros(0, 1, 4, 4, dtype=torch.uint8), source='mine'), 4, Rng(0))

def test_images_fit_each_other():
    x = torch.zeros(3, 1, 4, 4, dtype=torch.uint8)
    for kw,say in ((dict(labels=torch.zeros(2, dtype=torch.long), classes=['a']), '2 labels for 3'), (dict(captions=['a']), '1 captions for 3'),
                   (dict(labels=torch.tensor([0, 0, 1]), classes=['a']), r'\[2\] has label 1')):
        with pytest.raises(ValueError, match=say): Images(x, **kw)
    with pytest.raises(ValueError, match='bytes'): Images(x.float())

def test_drop_label_leaves_the_rest(garments):
    b = Stream(garments, Rng(0), [partial(drop_label, null=10, p=.5)])[torch.arange(500)]
    y, kept = b['cond']['y'], b['cond']['y']!=10
    assert torch.equal(y[kept], garments.labels[b['sample']][kept]) and 180<kept.sum()<320
    for p in (0., 1.): assert (Stream(garments, Rng(0), [partial(drop_label, null=10, p=p)])[torch.arange(50)]['cond']['y']==10).float().mean()==p

def test_random_crop_places(garments):
    "All corners are reached, and what is cut out is there in the image."
    x = torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4).expand(400, -1, -1, -1)
    out = random_crop(dict(x=x), Rng(0), 3)['x']
    corners = {o[0, 0, 0].item() for o in out}
    assert corners=={0, 1, 4, 5}
    for o in out: assert torch.equal(o[0]-o[0, 0, 0], torch.tensor([[0, 1, 2], [4, 5, 6], [8, 9, 10]], dtype=torch.uint8))
    with pytest.raises(ValueError, match='cannot cut'): random_crop(dict(x=x), Rng(0), 5)

# --- EDM's augmentation ---
OFF = dict.fromkeys(MULTIPLIERS, 0.)

def test_mirror_is_a_triangle_wave():
    for n in (1, 3, 8):
        row = list(range(n))+list(range(n))[::-1]
        assert mirror(torch.arange(-4*n, 4*n), n).tolist()==[row[k%(2*n)] for k in range(-4*n, 4*n)]

def test_finer_and_back():
    x = torch.randn(2, 3, 17, 24, dtype=torch.float64)
    assert (downsample(upsample(x))-x).abs().max()<1e-5
    assert (upsample(torch.ones(1, 1, 9, 9), 8)[..., 12:-12, 12:-12]-1).abs().max()<1e-5  # a constant stays one

def test_no_augmentation_is_the_identity():
    x = torch.randn(6, 3, 16, 16)
    b = edm_augment(dict(x=x, cond={}), Rng(0), p=0.)
    assert torch.equal(b['x'], x) and torch.equal(b['cond']['vec'], torch.zeros(6, 9))
    assert (warp(x, affine(torch.zeros(6, 8), 16, 16))-x).abs().max()<1e-4

@pytest.mark.parametrize('name,label,dim', [('xflip', 0, -1), ('yflip', 1, -2)])
def test_flips_are_exact(name, label, dim):
    x = torch.randn(200, 1, 8, 8)
    b = edm_augment(dict(x=x, cond={}), Rng(0), p=1., **{**OFF, name: 1.})
    turned = b['cond']['vec'][:, label]==1
    assert 60<turned.sum()<140 and torch.equal(b['x'], torch.where(turned.view(-1, 1, 1, 1), x.flip(dim), x))
    b['cond']['vec'][:, label] = 0
    assert not b['cond']['vec'].any()

def test_xflip_is_always_on():
    "Its multiplier of 1e8 makes the probability 1 at any p: half of all are mirrored."
    a = draw_augment(20000, Rng(0), .12, {})
    assert abs(a[:, 0].mean()-.5)<.02 and abs(a[:, 1].mean()-.06)<.01

def test_labels_are_as_in_the_paper():
    a = torch.tensor([[1., 0., .3, .5, .7, -2., .1, -.4]])
    want = [1, 0, .3, np.cos(.5)-1, np.sin(.5), -2*np.cos(.7), -2*np.sin(.7), .1, -.4]
    assert np.allclose(augment_labels(a)[0].numpy(), want, atol=1e-6)

def blob(cx, cy, n=32, r=2.):
    y, x = torch.meshgrid(torch.arange(n)-(n-1)/2, torch.arange(n)-(n-1)/2, indexing='ij')
    return torch.exp(-((x-cx)**2+(y-cy)**2)/(2*r*r))[None, None]

def centre(im):
    n = im.shape[-1]
    y, x = torch.meshgrid(torch.arange(n)-(n-1)/2, torch.arange(n)-(n-1)/2, indexing='ij')
    return torch.stack([(im*x).sum(), (im*y).sum()])/im.sum()

@pytest.mark.parametrize('k,value,to', [(2, 2.5, (4*2**.5, 2*2**.5)), (6, 1., (4+4., 2.)), (7, -1., (4., 2-4.)),
                                        (3, np.pi/2, (-2., 4.)), (5, 2.5, (4*2**.5, 2/2**.5))])
def test_maps_move_things_where_the_table_says(k, value, to):
    a = torch.zeros(1, 8); a[0, k] = value
    got = centre(warp(blob(4., 2.), affine(a, 32, 32)))
    assert torch.allclose(got, torch.tensor(to, dtype=torch.float), atol=.1), got

def test_augmentation_is_keyed_by_position(garments):
    s = Stream(garments, Rng(0), [floats, partial(edm_augment, p=.5)])
    whole, part = s[torch.arange(5990, 6010)], s[torch.arange(5998, 6004)]
    assert torch.allclose(whole['x'][8:14], part['x'], atol=1e-5) and torch.equal(whole['cond']['vec'][8:14], part['cond']['vec'])
    twice = s[torch.tensor([3, 6003])]['cond']['vec']
    assert not torch.equal(twice[0], twice[1])

def test_augmentation_refuses():
    x = torch.zeros(1, 1, 8, 8)
    with pytest.raises(TypeError, match='floats'): edm_augment(dict(x=x.byte(), cond={}), Rng(0))
    with pytest.raises(ValueError, match="called 'rotate'"): edm_augment(dict(x=x, cond={}), Rng(0), rotate=1.)

# --- one file ---
def test_decode_modes():
    p = pictures(1, 6)[0]
    rgb = torch.from_numpy(p).permute(2, 0, 1)
    for fmt in ('PNG', 'BMP', 'TIFF'): assert torch.equal(decode(png(p, fmt), 'x'), rgb)
    assert decode(png(p), 'x', 1).shape==(1, 6, 6) and decode(png(p[..., 0]), 'x').shape==(3, 6, 6)
    clear = np.dstack([p, np.zeros((6, 6), np.uint8)])
    assert (decode(png(clear), 'x')==255).all()                                # transparent means white
    pal = Image.fromarray(p).quantize(4)
    assert decode(png(pal, transparency=0), 'x').shape==(3, 6, 6)

def test_decode_turns_upright():
    im = Image.fromarray(pictures(1, 8)[0][:4])
    exif = Image.Exif(); exif[0x0112] = 6                                        # rotate by 90 degrees to view
    x = decode(png(im, 'PNG', exif=exif), 'x')
    assert x.shape==(3, 8, 4) and torch.equal(x, torch.from_numpy(np.array(im.rotate(-90, expand=True))).permute(2, 0, 1))

@pytest.mark.parametrize('data,say', [(b'', 'cannot be decoded'), (b'hello', 'cannot be decoded'), (png(pictures(1)[0])[:80], 'cannot be decoded'),
    (png(np.zeros((4, 4), np.uint16)), 'more than 8 bits'), (png(Image.new('1', (9000, 9000))), 'unpacks to 9000x9000'),
    (png(Image.new('1', (20000, 20000))), 'bomb')])
@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
def test_bad_files_are_named(data, say):
    with pytest.raises(BadImage, match='cats/7.png') as e: decode(data, 'cats/7.png')
    assert say in str(e.value) and '\n' not in str(e.value)

# --- folders and archives ---
def test_folder_zip_and_disk_agree(tree, tmp_path):
    members = [(f'top/{f.relative_to(tree).as_posix()}', f.read_bytes()) for f in sorted(tree.rglob('*.png'))]
    a, b, c = folder(tree), zip_file(zipped(tmp_path/'set.zip', members)), folder(tree, limit=0)
    assert a.classes==b.classes==['a', 'b', 'c'] and torch.equal(a.labels, b.labels)
    for o in (b, c):
        assert torch.equal(a.pixels, o.pixels[torch.arange(12)]) and torch.equal(a.pixels, torch.cat([*once(o, 5)]))
    for w in (0, 2): assert torch.equal(next(batches(b, 12, Rng(0), workers=w))['x'], next(batches(c, 12, Rng(0)))['x'])
    sub = c.take(torch.tensor([4, 2]))
    assert sub.name(0)==a.name(4) and torch.equal(sub.pixels[torch.arange(2)], a.pixels[[4, 2]])

def test_archive_on_disk_with_workers(tree, tmp_path):
    "Each process opens the archive for itself."
    members = [(f.relative_to(tree).as_posix(), f.read_bytes()) for f in sorted(tree.rglob('*.png'))]
    ds = zip_file(zipped(tmp_path/'set.zip', members), limit=0)
    ds.image(0)                                                               # opened here first
    one, two = (list(itertools.islice(batches(ds, 6, Rng(0), workers=w), 8)) for w in (0, 2))
    assert all(map(same, one, two))

def test_archives_are_opened_once_a_process(tree, tmp_path, monkeypatch):
    ds = zip_file(zipped(tmp_path/'set.zip', [('a.png', png(pictures(1)[0]))]), limit=0)
    ds.image(0); mine = opened.cache_info().misses
    ds.image(0); assert opened.cache_info().misses==mine
    monkeypatch.setattr('os.getpid', lambda: -1)                              # as in a worker
    ds.image(0); assert opened.cache_info().misses==mine+1

def test_a_bad_file_in_a_worker_is_one_clear_line(tree):
    ds = folder(tree, limit=0)
    (tree/'b'/'04.png').write_bytes(b'no image')
    with pytest.raises(BadImage, match='b/04.png cannot be decoded') as e: list(itertools.islice(batches(ds, 12, Rng(0), workers=2), 2))
    assert '\n' not in str(e.value) and 'Traceback' not in str(e.value)

@pytest.mark.parametrize('limit', [2**31, 0])
def test_skip_bad_counts(tree, limit):
    (tree/'b'/'04.png').write_bytes(b'no image')
    (tree/'a'/'03.png').write_bytes(png(pictures(1, 9)[0]))
    with pytest.raises(BadImage): folder(tree, limit=limit).pixels[torch.arange(12)]
    ds = folder(tree, limit=limit, skip_bad=True)
    assert len(ds)==10 and [n for n,_ in ds.skipped]==['a/03.png', 'b/04.png'] and 'a/03.png is 9x9' in ds.skipped[0][1]
    assert len(torch.cat([*once(ds)]))==10 and ds.labels.bincount().tolist()==[3, 3, 4]
    assert len(folder(tree, size=8, limit=limit, skip_bad=True))==11      # with a size, another size is no fault

def test_all_bad(tree):
    for f in tree.rglob('*.png'): f.write_bytes(b'no image')
    with pytest.raises(ValueError, match='none of 12'): folder(tree, skip_bad=True)
    with pytest.raises(ValueError, match='none of 12'): folder(tree, skip_bad=True, size=8)

def test_sizes(tree):
    (tree/'c'/'99.png').write_bytes(png(pictures(1, 9)[0]))
    with pytest.raises(BadImage, match='99.png is 9x9, and the first image 8x8: pass size=8'): folder(tree)
    assert folder(tree, size=4, channels=1).pixels.shape==(13, 1, 4, 4)

def test_classes(tree, tmp_path):
    with pytest.raises(ValueError, match='3 class folders'): folder(tree, n_classes=4)
    (tree/'stray.png').write_bytes(png(pictures(1)[0]))
    with pytest.raises(ValueError, match='stray.png is in no class folder'): folder(tree)
    assert folder(tree, label=None).labels is None
    with pytest.raises(FileNotFoundError, match='not a folder'): folder(tmp_path/'nowhere')
    (tmp_path/'empty').mkdir()
    with pytest.raises(ValueError, match='holds no images'): folder(tmp_path/'empty')

def test_captions(tree):
    names = folder(tree).names
    rows = [dict(file_name=n, text=f'picture, "{i}"') for i,n in enumerate(names)]
    (tree/'m.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    (tree/'m.csv').write_text('file_name,text\n'+'\n'.join(f'{r["file_name"]},"picture, ""{i}"""' for i,r in enumerate(rows)))
    for f in ('m.jsonl', 'm.csv'): assert folder(tree, captions=f).captions==[r['text'] for r in rows]
    for text,say in ((json.dumps(rows[0]), 'no caption for '+names[1]), ('{', 'not JSON lines'), ('[1]', 'entry 1'),
                     (json.dumps(dict(file_name='a')), 'needs file_name and text')):
        (tree/'bad.jsonl').write_text(text)
        with pytest.raises(ValueError, match=say): folder(tree, captions='bad.jsonl')
    with pytest.raises(FileNotFoundError, match="did you mean 'm.jsonl'"): folder(tree, captions='mm.jsonl')
    (tree/'more.jsonl').write_text('\n'.join(json.dumps(r) for r in [*rows, dict(file_name='a/gone.png', text='gone')]))
    with pytest.raises(ValueError, match='more.jsonl has a caption for a/gone.png, which is not in'): folder(tree, captions='more.jsonl')
    for o,say in ((None, 'None'), (b'bytes', "b'bytes'"), (3, '3')):
        with pytest.raises(ValueError, match=rf'set\[1\] has the caption {say}, which is no str'):
            Images(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), captions=['', o], source='set')

def test_captions_come_along(garments):
    "In batches they are lists, the same from workers; the order of names is the network's; a set without captions has no text."
    ds, tr = emoji('test'), [partial(only, names=['text']), floats]
    here, there = (list(itertools.islice(batches(ds, 7, Rng(4), start=21, workers=w, transforms=tr), 3)) for w in (0, 2))
    for a,b in zip(here, there):
        assert list(a['cond'])==['text'] and a['cond']==b['cond'] and torch.equal(a['x'], b['x'])
        assert a['cond']['text']==[ds.captions[i] for i in a['sample'].tolist()]
    assert list(next(batches(garments, 2, Rng()))['cond'])==['y']
    assert list(next(batches(ds, 2, Rng(), transforms=[partial(only, names=['text', 'y'])]))['cond'])==['text', 'y']
    with pytest.raises(ValueError, match='the conditions are y: there is no text'): next(batches(garments, 2, Rng(), transforms=tr))

@pytest.mark.parametrize('name', ['../x.png', 'a/../../x.png', '/etc/x.png', 'C:/x.png', '..\\x.png'])
def test_archives_that_lead_out_are_refused(tmp_path, name):
    data = zipped(tmp_path/'z.zip', [('ok.png', png(pictures(1)[0])), ('b'*len(name), png(pictures(1)[0]))]).read_bytes()
    (tmp_path/'z.zip').write_bytes(data.replace(b'b'*len(name), name.encode()))      # as a hostile tool would write it
    with pytest.raises(ValueError, match='make the archive anew') as e: in_zip(tmp_path/'z.zip')
    assert 'absolute' in str(e.value) or 'leads out' in str(e.value)

def test_archives_with_links_encryption_or_bombs_are_refused(tmp_path):
    link = zipfile.ZipInfo('link.png'); link.external_attr = 0o120777<<16
    with pytest.raises(ValueError, match='symbolic link'): in_zip(zipped(tmp_path/'l.zip', [(link, '/etc/passwd')]))
    data = bytearray(zipped(tmp_path/'e.zip', [('x.png', b'1234')]).read_bytes())
    for sig,at in ((b'PK\3\4', 6), (b'PK\1\2', 8)): data[data.index(sig)+at] |= 1
    (tmp_path/'e.zip').write_bytes(data)
    with pytest.raises(ValueError, match='encrypted'): in_zip(tmp_path/'e.zip')
    with zipfile.ZipFile(tmp_path/'b.zip', 'w', zipfile.ZIP_DEFLATED) as z: z.writestr('x.png', bytes(2**28+1))
    with pytest.raises(ValueError, match='unpacks to'): in_zip(tmp_path/'b.zip')
    (tmp_path/'n.zip').write_bytes(b'PK not a zip')
    with pytest.raises(ValueError, match='not a zip archive'): in_zip(tmp_path/'n.zip')
    with pytest.raises(FileNotFoundError): in_zip(tmp_path/'none.zip')

def test_damaged_member_is_named(tmp_path):
    data = bytearray(zipped(tmp_path/'d.zip', [('a.png', png(pictures(1)[0])), ('b.png', png(pictures(1)[0]))]).read_bytes())
    data[data.index(b'IDAT')+6] ^= 255                                               # the checksum no longer fits
    (tmp_path/'d.zip').write_bytes(data)
    with pytest.raises(BadImage, match='a.png cannot be read'): zip_file(tmp_path/'d.zip', size=8)
    assert len(zip_file(tmp_path/'d.zip', size=8, skip_bad=True))==1

def test_hidden_files_do_not_count(tree):
    for n in ('.DS_Store.png', '__MACOSX/a.png', '.cache/b.png'):
        (tree/n).parent.mkdir(exist_ok=True); (tree/n).write_bytes(b'junk')
    assert len(folder(tree))==12

# --- known sets ---
def idx(x): return b'\0\0\x08'+bytes([x.ndim])+struct.pack(f'>{x.ndim}I', *x.shape)+x.tobytes()

@pytest.mark.parametrize('where,pack', [('', gzip.compress), ('', bytes), ('FashionMNIST/raw', bytes)])
def test_fashion_mnist_full(tmp_path, where, pack):
    d = tmp_path/where; d.mkdir(parents=True, exist_ok=True)
    x, y, z = np.random.default_rng(0).integers(0, 256, (5, 28, 28), np.uint8), np.array([9, 0, 3, 3, 1], np.uint8), '.gz' if pack is gzip.compress else ''
    for part,o in (('images-idx3', x), ('labels-idx1', y)): (d/f't10k-{part}-ubyte{z}').write_bytes(pack(idx(o)))
    ds = fashion_mnist_full(str(tmp_path), 'test')
    assert np.array_equal(ds.pixels[:, 0], x) and ds.labels.tolist()==y.tolist() and ds.classes==fashion_mnist().classes
    (d/f't10k-images-idx3-ubyte{z}').write_bytes(pack(idx(x)[:-1]))
    with pytest.raises(ValueError, match='fetch it again'): fashion_mnist_full(str(tmp_path), 'test')
    (d/f't10k-images-idx3-ubyte{z}').write_bytes(pack(b'hello'))
    with pytest.raises(ValueError, match='not an idx file'): fashion_mnist_full(str(tmp_path), 'test')
    with pytest.raises(FileNotFoundError, match='dataset-fashion-mnist'): fashion_mnist_full(str(tmp_path))

def test_idx_that_is_cut_short(tmp_path):
    (tmp_path/'t10k-images-idx3-ubyte.gz').write_bytes(gzip.compress(b'x'*1000)[:20])
    with pytest.raises(ValueError, match='cannot be unpacked'): fashion_mnist_full(str(tmp_path), 'test')

@pytest.mark.skipif(not Path('/usr/share/datasets/fashion-mnist').exists(), reason="Debian's package is not installed")
def test_the_embedded_garments_are_of_the_full_set():
    full = {x.numpy().tobytes() for x in fashion_mnist_full().pixels}
    assert len(full)>59000 and all(x.numpy().tobytes() in full for x in fashion_mnist().pixels)

def cifar_bytes(n, seed=0):
    g = np.random.default_rng(seed)
    x, y = g.integers(0, 256, (n, 3, 32, 32), np.uint8), g.integers(0, 10, n, np.uint8)
    return x, y, np.concatenate([y[:, None], x.reshape(n, -1)], 1).tobytes()

def test_cifar10(tmp_path):
    parts = [cifar_bytes(4, k) for k in range(5)]
    d = tmp_path/'cifar-10-batches-bin'; d.mkdir()
    for k,o in enumerate(parts, 1): (d/f'data_batch_{k}.bin').write_bytes(o[2])
    archive = tmp_path/'cifar-10-binary.tar.gz'
    with tarfile.open(archive, 'w:gz') as t: t.add(d, 'cifar-10-batches-bin')
    for p in (tmp_path, d, archive):
        ds = cifar10(str(p))
        assert np.array_equal(ds.pixels, np.concatenate([o[0] for o in parts])) and ds.labels.tolist()==np.concatenate([o[1] for o in parts]).tolist()
    with pytest.raises((ValueError, FileNotFoundError), match='test_batch.bin|CIFAR-10'): cifar10(str(archive), 'test')
    (d/'data_batch_3.bin').write_bytes(parts[2][2][:-5])
    with pytest.raises(ValueError, match='data_batch_3.bin has 12287 bytes'): cifar10(str(d))
    (d/'data_batch_3.bin').write_bytes(b'\x0b'+parts[2][2][1:])
    with pytest.raises(ValueError, match='label 11'): cifar10(str(d))
    archive.write_bytes(archive.read_bytes()[:400])
    with pytest.raises(ValueError, match='not the binary archive'): cifar10(str(archive))

def test_cifar10_pickles_are_refused(tmp_path):
    (tmp_path/'cifar-10-batches-py').mkdir()
    with pytest.raises(ValueError, match='pickled'): cifar10(str(tmp_path))
    with pytest.raises(FileNotFoundError, match='fetch cifar-10-binary.tar.gz'): cifar10(str(tmp_path/'nowhere'))

def test_imagenette_and_imagenet(tmp_path):
    from diffnb.data.files import IMAGENETTE
    for c in IMAGENETTE:
        f = tmp_path/'train'/c/'1.JPEG'; f.parent.mkdir(parents=True); f.write_bytes(png(pictures(1, 20)[0], 'JPEG'))
    ds = imagenette(str(tmp_path), size=16)
    assert ds.classes[0]=='tench' and ds.labels.tolist()==list(range(10)) and ds.shape==(3, 16, 16)
    with pytest.raises(ValueError, match='10 class folders .*, not 1000'): imagenet(str(tmp_path))
    with pytest.raises(FileNotFoundError, match='val is not a folder'): imagenet(str(tmp_path), 'val')
    for k in range(1000):
        f = tmp_path/'val'/f'n{k:08}'/'1.png'; f.parent.mkdir(parents=True); f.write_bytes(png(pictures(1, 4)[0]))
    assert len(imagenet(str(tmp_path), 'val', size=4).classes)==1000

def test_ffhq64(tmp_path):
    members = [(f'{k//2:05}/img{k:08}.png', png(p)) for k,p in enumerate(pictures(4, 64))]
    ds = ffhq64(str(zipped(tmp_path/'ffhq.zip', members)))
    assert ds.shape==(3, 64, 64) and ds.labels is None and 'y' not in next(batches(ds, 4, Rng(0)))['cond']

def test_misspelt_split():
    for f in (fashion_mnist, partial(cifar10, '.'), partial(imagenette, '.')):
        with pytest.raises(ValueError, match='split is one of'): f(split='tets')
