"""The README's code, run as it stands on a small set, and what else must not drift from it."""

import ast
import re
import shutil

import torch

import airbench94
from conftest import NARROW, ROOT

README = (ROOT / 'README.md').read_text()
SNIPPETS = re.findall(r'```python\n(.*?)```', README, re.DOTALL)


def code_lines(snippet):
    return [line for line in snippet.splitlines() if line.strip()]


def test_the_python_examples_run(tmp_path, folder, monkeypatch, capsys):
    for key, (group, name) in airbench94.leaves(airbench94.override(airbench94.hyp, NARROW + ['opt.train_epochs=1'])):
        here, leaf = dict(airbench94.leaves(airbench94.hyp))[key]
        monkeypatch.setitem(here, leaf, group[name])
    monkeypatch.setattr(airbench94.torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(airbench94.torch.backends.mps, 'is_available', lambda: False)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, 'cifar10')
    subset, save, many = SNIPPETS
    assert len(code_lines(subset)) <= 15 and len(code_lines(save)) <= 6
    names = {}
    exec(subset, names)
    assert len(names['train_loader'].images) == 120     # 60% of 200
    assert 0 <= float(capsys.readouterr().out) <= 1
    exec(save, names)
    assert names['predictions'].shape == (60,)
    accuracy = (names['predictions'] == names['test_loader'].labels).float().mean().item()
    assert abs(accuracy - names['record']['tta_val_acc']) < 1e-6
    exec(many, names)
    assert len(names['kept']) == 2 and not any(torch.equal(*(state[key] for state in names['kept']))
                                               for key in names['kept'][0] if key.endswith('conv.weight'))


def test_the_set_up_is_what_ci_and_the_script_need():
    for line in ('pip install -r requirements.txt && python airbench94.py',
                 'pip install -r requirements.txt && python -m pytest'):
        assert line in README
    ci = (ROOT / '.ci' / 'run').read_text()
    assert 'pip install --quiet --requirement requirements.txt\npython -m pytest\n' in ci
    required = [line.split('#')[0].strip() for line in (ROOT / 'requirements.txt').read_text().splitlines()]
    assert all('#' in line for line in (ROOT / 'requirements.txt').read_text().splitlines())
    inline = {re.search(r'^# dependencies = (.*)$', path.read_text(), re.MULTILINE)[1] for path in ROOT.glob('*.py')}
    assert len(inline) == 1 and set(ast.literal_eval(inline.pop())) <= set(required)


def test_links_to_files_lead_somewhere():
    targets = [link for link in re.findall(r'\]\(([^)]+)\)', README) if '://' not in link and not link.startswith('#')]
    assert targets and all((ROOT / target).exists() for target in targets)
