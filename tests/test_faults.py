"Kills at the write points of the commands, and what the disk refuses: nothing is lost, nothing half written is read."
import errno, os
import pytest
import crash
from crash import Session, killed_at, refused_at, torn_at
from diffnb.saving import Damaged, add_lines, load_arrays, unpacked
from diffnb.train.loop import Log, rows

@pytest.fixture(scope='module')
def session(tmp_path_factory):
    "An undisturbed run, kept in memory where that is possible: it waits for the disk some hundred times."
    return Session(tmp_path_factory.mktemp('faults').resolve()/'session')

@pytest.mark.slow
@pytest.mark.parametrize('name,every', [('train', 40), ('sample', 2), ('eval', 1)])
def test_killed_at_write_points(session, name, every): assert killed_at(session, name, every)>0

@pytest.mark.slow
def test_killed_at_every_write_point(session): assert killed_at(session, 'train')>100

@pytest.mark.slow
@pytest.mark.parametrize('code', [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize('name', crash.COMMANDS)
def test_refused_at_every_write_point(session, name, code): refused_at(session, name, code)

@pytest.mark.slow
@pytest.mark.parametrize('name', crash.COMMANDS)
def test_killed_in_the_middle_of_a_write(session, name): torn_at(session, name, [10, 100, 1000, 10_000, 100_000])

def test_a_line_that_was_cut_off_spoils_no_other(tmp_path):
    p = tmp_path/'eval.jsonl'
    add_lines(p, ['{"a": 1}', '{"a": 2}'])
    p.write_bytes(p.read_bytes()[:-4])
    add_lines(p, ['{"a": 3}'])
    assert rows(p)==[{'a': 1}, {'a': 3}]

def test_a_log_that_cannot_be_written_is_written_later(tmp_path, monkeypatch):
    "A full disk must not end a run for the sake of a line, least of all for the line that says that it is full."
    import diffnb.train.loop as loop
    log, full = Log(tmp_path, 10, 0, False), [True]
    def refuse(path, lines):
        if full: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        add_lines(path, lines)
    monkeypatch.setattr(loop, 'add_lines', refuse)
    log.say('one'); log.add('log.jsonl', '{"step": 1}')
    full.clear()
    log.say('two'); log.add('log.jsonl', '{"step": 2}'); log.add('log.jsonl', '{"step": 3}')
    assert [o['step'] for o in rows(tmp_path)]==[1, 2, 3] and len((tmp_path/'log.txt').read_text().splitlines())==2

def test_archives_that_have_changed(tmp_path):
    import gzip, numpy as np
    np.savez_compressed(tmp_path/'a.npz', x=np.arange(1000))
    (tmp_path/'a.gz').write_bytes(gzip.compress(b'hello'*100))
    for name,reads in (('a.npz', load_arrays), ('a.gz', unpacked)):
        good = (tmp_path/name).read_bytes()
        k = len(good)//2
        for bad in (good[:-1], good[:len(good)//2], good[:k]+bytes([good[k]^255])+good[k+1:]):
            (tmp_path/name).write_bytes(bad)
            with pytest.raises(Damaged, match=name): reads(tmp_path/name)
