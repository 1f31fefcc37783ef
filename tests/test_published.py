"The published streams of settings.ini, as far as they go without a network: small data sets stand in for the hub's, with their schema."
import io
import shutil
from pathlib import Path
from unittest.mock import patch

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from PIL import Image
from transformers import BertConfig, BertModel, BertTokenizer, CLIPConfig, CLIPModel

from direction_fusion.study import bench, load_study, run_method, studies, task_specs
from direction_fusion.tasks import PAIR, check_spec, load_task, overlaps

ROOT = Path(__file__).resolve().parents[1]
THREE = 'train', 'validation', 'test'
MNLI = 'train', 'validation_matched', 'validation_mismatched', 'test_matched', 'test_mismatched'
NOISY = ('train', 'test', 'contrast', 'gaussian_noise', 'impulse_noise', 'jpeg_compression', 'motion_blur', 'pixelate', 'spatter')
ENTAILS, DIGITS = ('entailment', 'not_entailment'), tuple('0123456789')

# task → hub name, configuration (None: the hub's only one), columns of the input, classes (of long lists the first), splits:
# as the cards of the data sets say
HUB = dict(
    cola=('nyu-mll/glue', 'cola', ('sentence',), ('unacceptable', 'acceptable'), THREE),
    sst2=('nyu-mll/glue', 'sst2', ('sentence',), ('negative', 'positive'), THREE),
    mrpc=('nyu-mll/glue', 'mrpc', ('sentence1', 'sentence2'), ('not_equivalent', 'equivalent'), THREE),
    qqp=('nyu-mll/glue', 'qqp', ('question1', 'question2'), ('not_duplicate', 'duplicate'), THREE),
    mnli=('nyu-mll/glue', 'mnli', ('premise', 'hypothesis'), ('entailment', 'neutral', 'contradiction'), MNLI),
    qnli=('nyu-mll/glue', 'qnli', ('question', 'sentence'), ENTAILS, THREE),
    rte=('nyu-mll/glue', 'rte', ('sentence1', 'sentence2'), ENTAILS, THREE),
    sun397=('tanganke/sun397', None, ('image',), ('abbey', 'airplane cabin', 'airport terminal'), ('train', 'test')),
    stanford_cars=('tanganke/stanford_cars', None, ('image',), ('AM General Hummer SUV 2000', 'Acura RL Sedan 2012'), NOISY),
    resisc45=('tanganke/resisc45', None, ('image',), ('airplane', 'airport', 'baseball diamond'), NOISY),
    eurosat=('tanganke/eurosat', None, ('image',), ('annual crop land', 'forest'), NOISY),
    svhn=('ufldl-stanford/svhn', 'cropped_digits', ('image',), DIGITS, ('train', 'test', 'extra')),
    gtsrb=('tanganke/gtsrb', None, ('image',), ('20 kph speed limit', '30 kph speed limit'), NOISY),
    mnist=('ylecun/mnist', None, ('image',), DIGITS, ('train', 'test')),
    dtd=('tanganke/dtd', None, ('image',), ('banded', 'blotchy', 'braided'), ('train', 'test')))
PUBLISHED = dict(glue=list(HUB)[:7], clip=list(HUB)[7:])
ROWS, DRAWN = 60, 40 # examples of each split; of `train` drawn


def png(seed):
    array = np.random.default_rng(seed).integers(0, 256, (9, 12, 3)).astype('uint8')
    Image.fromarray(array).save(out := io.BytesIO(), 'PNG')
    return {'bytes': out.getvalue(), 'path': f'{seed}.png'}


def split_of(task, split):
    "Rows sorted by class, as some of the published are; the first three of `train` are the test's. GLUE hides test labels."
    _, config, columns, classes, splits = HUB[task]
    asked = next(s for s in splits if s.startswith('validation' if 'validation' in splits[1] else 'test'))
    labels = sorted(i % len(classes) for i in range(ROWS))
    turn = lambda i: splits.index(asked if split == 'train' and i < 3 else split) * ROWS + i
    if columns == ('image',): shown = {'image': [png(1000 * list(HUB).index(task) + turn(i)) for i in range(ROWS)]}
    else: shown = {c: [f'{c} {turn(i)} of {task}' for i in range(ROWS)] for c in columns}
    if task == 'qqp' and split == 'train': shown['question2'][5] = '' # as in GLUE
    if split.startswith('test') and config == task: labels = [-1] * ROWS
    kinds = {c: datasets.Image() if c == 'image' else Value('string') for c in columns} | {'label': ClassLabel(names=list(classes))}
    return Dataset.from_dict(shown | {'label': labels, 'idx': range(ROWS)}, features=Features(kinds | {'idx': Value('int32')}))


def hub(name, config=None, split=None):
    "In place of `datasets.load_dataset`."
    task = next((t for t, (n, c, *_) in HUB.items() if (n, c) == (name, config)), None)
    if task is None: raise ValueError(f'no data set {name} with configuration {config}')
    if split not in HUB[task][4]: raise ValueError(f'{name} has no split {split}')
    return split_of(task, split)


@pytest.fixture
def offline():
    with patch.object(datasets, 'load_dataset', side_effect=hub): yield
    bench.cache_clear()


def specs(): return task_specs(load_study('glue', ROOT))


@pytest.mark.parametrize('name', PUBLISHED)
def test_studies_are_listed_and_valid(name):
    assert name in studies(ROOT)
    study = load_study(name, ROOT)
    assert list(study.tasks) == PUBLISHED[name] and set(study.tasks) <= set(task_specs(study))
    assert (study.freeze, study.heads, study.protocol) == ('', 'own', 'base')


def test_a_published_task_is_no_shipped_one():
    from direction_fusion.tasks import SHIPPED
    assert not set(specs()) & set(SHIPPED)


@pytest.mark.parametrize('task', HUB)
def test_every_key_fits_the_hub(task, offline):
    "Name, configuration, splits, columns, order of the classes; what `train` shares with the test is dropped from `train`."
    name, config, columns, classes, splits = HUB[task]
    spec = specs()[task]
    shown = [spec[k] for k in ('text', 'pair', 'image') if k in spec]
    assert check_spec(task, spec) == {'hub': name} and spec.get('config') == config and tuple(shown) == columns
    made = load_task(task, DRAWN, 10, ROWS, spec=spec)
    assert tuple(made['train'].features['label'].names) == classes
    assert len(set(made['validation'][:]['label'])) == len(classes)   # not the last rows of a sorted file
    if 'image' in spec: assert made['train'].features['pixel_values'].shape == (3, 224, 224)
    else:
        asked = Dataset.to_pandas(split_of(task, next(s for s in splits if s.startswith('validation'))))
        assert sorted(made['test'][:]['text']) == sorted(PAIR.join(r) for r in asked[list(columns)].to_numpy().tolist())
    assert overlaps({task: made}).to_numpy().item() == 0
    with pytest.raises(ValueError, match='in `test` are in `train` too'):
        load_task(task, DRAWN, 10, ROWS, spec={k: v for k, v in spec.items() if k != 'copies'})


def tiny_clip(folder):
    tower = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    words = dict(vocab_size=37, max_position_embeddings=20, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    torch.manual_seed(0)
    vision = tower | dict(image_size=224, patch_size=56)
    CLIPModel(CLIPConfig(projection_dim=8, text_config=tower | words, vision_config=vision)).save_pretrained(folder)


def tiny_bert(folder):
    words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *'0123456789', 'of', 'sentence', 'premise', 'hypothesis', 'cola', 'mnli']
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
                         max_position_embeddings=128)).save_pretrained(folder)
    BertTokenizer({w: i for i, w in enumerate(words)}, model_max_length=128).save_pretrained(folder)


@pytest.mark.parametrize('name, tasks, make, kw', [
    ('clip', ('eurosat', 'dtd'), tiny_clip, {}), ('clip', ('eurosat', 'dtd'), tiny_clip, dict(lora_rank=2)),
    ('glue', ('cola', 'mnli'), tiny_bert, {})])
def test_a_stream_runs_to_the_end_on_a_tiny_model(name, tasks, make, kw, offline, tmp_path):
    "Two of its tasks: training, fusion, LoRA, all tasks in one batch (pairs beside single texts), evaluation."
    shutil.copy(ROOT/'settings.ini', tmp_path)
    make(tmp_path/'model')
    study = load_study(name, tmp_path, model='model', tasks=tasks, train_size=24, val_size=9, test_size=20, epochs=1, **kw)
    for method in ('soft_soup', 'ties', 'joint'):
        R = np.array(run_method(study, method, {}, 0, 0).R, dtype=float)
        assert R.shape == (2, 2) and (R[np.tril_indices(2)] >= 0).all()
    held = bench(study)
    kinds = [{k for k in t['train'].column_names if k != 'labels'} for t in held.tasks.values()]
    assert kinds == ([{'pixel_values'}] * 2 if name == 'clip' else [{'input_ids'}, {'input_ids', 'token_type_ids'}])
    if name == 'clip':
        assert not any(k.startswith('text_model') for k in held.base)
        with pytest.raises(ValueError, match="model 'model' has no tokenizer, but 'cola' is a text task"):
            bench(load_study('glue', tmp_path, model='model', tasks=('cola',), train_size=24, val_size=9, test_size=20))
    else:
        with pytest.raises(ValueError, match="task 'dtd': the model takes no images of 3 × 224 × 224"):
            bench(load_study('clip', tmp_path, model='model', tasks=('dtd',), train_size=24, val_size=9, test_size=20))
