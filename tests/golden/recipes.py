"""Write recipes.npz: what mergekit makes of the recipes below on tiny random models, for tests/test_recipes.py.

Needs an environment of its own:  pip install torch mergekit==0.1.5
Run from the repository root:     python -P tests/golden/recipes.py

The models are drawn with numpy from a seed, so that the test has the same ones without a file. A recipe names them b (base),
x, y, z of each architecture: `llama-b`; m and n lie near b, and o opposite to p as seen from c. Kept are a few parameters of
each result, which together see every layer, both sides of the layers, and matrices as well as vectors.
"""
import json
import platform
import sys
import zlib
from importlib.metadata import version
from pathlib import Path

import numpy as np

SEED = 0
TINY = dict(vocab_size=5, hidden_size=4, intermediate_size=6, num_hidden_layers=4, num_attention_heads=2, max_position_embeddings=8)
CONFIGS = dict(
    llama=dict(model_type='llama', architectures=['LlamaForCausalLM'], num_key_value_heads=1, head_dim=2, **TINY),
    bert=dict(model_type='bert', architectures=['BertForSequenceClassification'], type_vocab_size=2, **TINY),
    t5=dict(model_type='t5', architectures=['T5ForConditionalGeneration'], vocab_size=5, d_model=4, d_kv=2, d_ff=6, num_layers=3,
            num_decoder_layers=2, num_heads=2, feed_forward_proj='gated-gelu', relative_attention_num_buckets=4,
            tie_word_embeddings=True))


def shapes(kind):
    "Parameter → shape, as a checkpoint of the architecture has them."
    d, f, v, n = 4, 6, 5, 4
    if kind == 'llama':
        out = {'model.embed_tokens.weight': (v, d), 'model.norm.weight': (d,), 'lm_head.weight': (v, d)}
        layer = {f'self_attn.{p}_proj.weight': (2 if p in 'kv' else d, d) for p in 'qkvo'}
        layer |= {'mlp.gate_proj.weight': (f, d), 'mlp.up_proj.weight': (f, d), 'mlp.down_proj.weight': (d, f),
                  'input_layernorm.weight': (d,), 'post_attention_layernorm.weight': (d,)}
        return out | {f'model.layers.{i}.{k}': s for i in range(n) for k, s in layer.items()}
    if kind == 'bert':
        both = lambda k, o, i: {f'{k}.weight': (o, i), f'{k}.bias': (o,)}
        norm = lambda k: {f'{k}.LayerNorm.weight': (d,), f'{k}.LayerNorm.bias': (d,)}
        out = {f'bert.embeddings.{k}_embeddings.weight': (m, d) for k, m in dict(word=v, position=8, token_type=2).items()}
        out |= norm('bert.embeddings') | both('bert.pooler.dense', d, d) | both('classifier', 2, d)
        for p in (f'bert.encoder.layer.{i}' for i in range(n)):
            for k in ('query', 'key', 'value'): out |= both(f'{p}.attention.self.{k}', d, d)
            out |= both(f'{p}.attention.output.dense', d, d) | norm(f'{p}.attention.output') | both(f'{p}.intermediate.dense', f, d)
            out |= both(f'{p}.output.dense', d, f) | norm(f'{p}.output')
        return out
    out = {'shared.weight': (v, d)}
    for side, layers in dict(encoder=3, decoder=2).items():
        out |= {f'{side}.final_layer_norm.weight': (d,), f'{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight': (4, 2)}
        for i in range(layers):
            parts = ['SelfAttention', 'EncDecAttention', 'DenseReluDense'] if side == 'decoder' else ['SelfAttention', 'DenseReluDense']
            for j, part in enumerate(parts):
                p = f'{side}.block.{i}.layer.{j}'
                out[f'{p}.layer_norm.weight'] = (d,)
                out |= ({f'{p}.{part}.{w}.weight': (d, d) for w in 'qkvo'} if 'Attention' in part else
                        {f'{p}.{part}.wi_0.weight': (f, d), f'{p}.{part}.wi_1.weight': (f, d), f'{p}.{part}.wo.weight': (d, f)})
    return out


def model(name):
    "State dict of one model, float32: a base, or a base plus a common and an own direction."
    kind, who = name.split('-')
    draw = lambda part, k, s: np.random.default_rng([SEED, zlib.crc32(f'{kind} {part} {k}'.encode())]).standard_normal(s, np.float32)
    if who == 'b': return {k: draw('b', k, s) for k, s in shapes(kind).items()}
    if who in 'mn': return {k: draw('b', k, s) + np.float32(1e-3) * draw(who, k, s) for k, s in shapes(kind).items()}
    if who in 'cop': # sixteenths: p and o are exactly as far from c, on opposite sides
        part = lambda name, k, s: np.rint(16 * draw(name, k, s)) / np.float32(16)
        return {k: part('b', k, s) + dict(c=0, o=-1, p=1)[who] * part('p', k, s)
                for k, s in shapes(kind).items()}
    return {k: draw('b', k, s) + np.float32(.5) * (draw('common', k, s) + draw(who, k, s)) for k, s in shapes(kind).items()}


def kept(kind):
    "Names of the parameters that the golden file holds."
    wanted = ('embed_tokens', 'norm', 'lm_head', 'k_proj', 'down_proj', 'word_embeddings', 'classifier.bias', 'self.key.bias',
              'intermediate.dense.bias', 'pooler.dense.bias', 'shared', 'wo.weight')
    return [k for k in shapes(kind) if any(w in k for w in wanted) and 'post_' not in k]


XY = """
models:
  - model: llama-x
  - model: llama-y
"""
XYZ = XY + "  - model: llama-z\n"
STACKS = """
slices:
  - sources:
      - {model: llama-x, layer_range: [0, 4]}
      - {model: llama-y, layer_range: [0, 4]}
"""


def weighed(**params):
    "Three models with weights, and with other parameters of their own: density=[.3, .5, .8]."
    rows = [dict(model=f'llama-{m}', parameters=dict(weight=w) | {n: v[i] for n, v in params.items() if n != 'weight'})
            for i, (m, w) in enumerate(zip('xyz', params.get('weight', [1, .3, .5])))]
    return f'models: {json.dumps(rows)}\nbase_model: llama-b\n'


RECIPES = dict(
    # means and sums
    linear=weighed() + "merge_method: linear\nparameters: {weight: 1}\ndtype: float64",
    linear_own=XYZ + "merge_method: linear\nparameters: {weight: [1, 3]}\ndtype: float32",
    linear_sum="""
models:
  - model: llama-x
    parameters:
      weight:
        - filter: mlp
          value: [0.2, 0.9, 0.1]
        - filter: layers.1
          value: 0.7
        - value: [0.4, 0.6]
  - model: llama-y
    parameters: {weight: [-0.5, 1e-1]}
merge_method: linear
parameters: {normalize: false}
dtype: float64""",
    linear_half=XY + "merge_method: linear\nparameters: {weight: [1, 3]}\ndtype: float32\nout_dtype: bfloat16",
    linear_cast=XY + "merge_method: linear\nparameters: {weight: [1, 3]}\ndtype: bfloat16",
    bert=XY.replace('llama', 'bert') + "merge_method: linear\nparameters: {weight: [{filter: key, value: [1, 3]}, {value: 2}]}",
    t5="""
models:
  - model: t5-x
    parameters: {weight: [0, 1]}
  - model: t5-y
    parameters: {weight: [{filter: encoder, value: [1, 0, 1]}, {value: 0.5}]}
base_model: t5-b
merge_method: task_arithmetic
dtype: float64""",
    task_arithmetic=weighed(weight=[.5, -.3, [0, 1]]) + "merge_method: task_arithmetic\nparameters: {lambda: 0.7}\ndtype: float64",
    task_mean=weighed() + "merge_method: task_arithmetic\nparameters: {normalize: true, lambda: [0.5, 1.5]}\ndtype: float64",
    # spheres
    slerp=STACKS + """
merge_method: slerp
base_model: llama-x
parameters:
  t:
    - filter: self_attn
      value: [0, 0.4, 0.2, 0.8, 1]
    - filter: mlp
      value: [1, 0.6, 0.8, 0.2, 0]
    - value: 0.5
dtype: float32
out_dtype: bfloat16""",
    slerp_turned=XY + "merge_method: slerp\nbase_model: llama-y\nparameters: {t: [0.1, 0.6]}\ndtype: float64",
    slerp_slices="""
slices:
  - sources:
      - {model: llama-x, layer_range: [0, 1]}
      - {model: llama-y, layer_range: [0, 1]}
    parameters: {t: [0.2, 0.9]}
  - sources:
      - {model: llama-x, layer_range: [1, 4]}
      - {model: llama-y, layer_range: [1, 4]}
    parameters: {t: [{filter: mlp, value: [0.3, 0.5]}]}
merge_method: slerp
base_model: llama-x
parameters: {t: [0.6, 0.8]}
dtype: float64""",
    slerp_near=XY.replace('-x', '-m').replace('-y', '-n') + "merge_method: slerp\nbase_model: llama-m\n"
               "parameters: {t: 0.3}\ndtype: float64",
    nuslerp=XY + "merge_method: nuslerp\nparameters: {weight: [{filter: mlp, value: [1, 2]}, {value: 1}]}\ndtype: float64",
    nuslerp_rows=weighed(weight=[1, [1, 3]]) + "merge_method: nuslerp\nparameters: {nuslerp_flatten: false}\ndtype: float64",
    nuslerp_columns=weighed(weight=[1, 3]) + "merge_method: nuslerp\ndtype: float64\n"
                    "parameters: {nuslerp_flatten: false, nuslerp_row_wise: true}",
    multislerp=weighed() + "merge_method: multislerp\ndtype: float64",
    multislerp_sum=weighed() + "merge_method: multislerp\nparameters: {normalize_weights: false}\ndtype: float64",
    multislerp_weights=XYZ + "merge_method: multislerp\nparameters: {weight: 1}\ndtype: float64",
    karcher=XYZ + "merge_method: karcher\nparameters: {max_iter: 1000, tol: 1e-12}\ndtype: float64",
    karcher_base=XY + "merge_method: karcher\nbase_model: llama-b\nparameters: {max_iter: 1000, tol: 1e-12}\ndtype: float64",
    model_stock=XYZ + "merge_method: model_stock\nbase_model: llama-b\ndtype: float64",
    model_stock_near=XYZ.replace('-x', '-m').replace('-y', '-n') + "merge_method: model_stock\nbase_model: llama-b\ndtype: float64",
    model_stock_opposed=XYZ.replace('-x', '-p').replace('-y', '-o') + "merge_method: model_stock\nbase_model: llama-c\n"
                        "parameters: {filter_wise: true}\ndtype: float64",
    # thinned out
    ties_drawn=XY.replace('-x', '-p').replace('-y', '-o') + "merge_method: ties\nbase_model: llama-c\n"
               "parameters: {weight: 1, density: 1}\ndtype: float64",
    ties_opposed=XYZ.replace('-x', '-p').replace('-y', '-o') + "merge_method: ties\nbase_model: llama-c\n"
                 "parameters: {weight: [-1, 0.5], density: 1, rescale: true, normalize: false, lambda: 0.5}\ndtype: float64",
    ties=weighed(weight=[1, [.3, .9], 1]) + "merge_method: ties\nparameters: {density: [0.3, 0.9], lambda: 0.8}\ndtype: float64",
    ties_base_listed=XYZ + "  - model: llama-b\nmerge_method: ties\nbase_model: llama-b\n"
                     "parameters: {weight: 1, density: 0.4, normalize: true, int8_mask: true}\ndtype: float64\nout_dtype: bfloat16",
    ties_each="""
models:
  - model: llama-x
    parameters:
      density: [0.9, 0.6, 0.2]
      weight: 1.0
  - model: llama-y
    parameters:
      density: 0.5
      weight: [0.1, 0.4, 0.8, 1]
  - model: llama-z
    parameters:
      density: 0.4
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: llama-b
parameters: {normalize: true, int8_mask: true}
dtype: float32""",
    ties_sum=weighed(weight=[.5, .5, .2]) + "merge_method: ties\nparameters: {density: 0.5, normalize: false}\ndtype: float64",
    ties_signed=weighed(weight=[1, -.4, .5]) + "merge_method: ties\nparameters: {density: 0.5}\ndtype: float64",
    ties_rescaled=weighed() + "merge_method: ties\nparameters: {density: 0.5, rescale: true}\ndtype: float64",
    breadcrumbs=weighed() + "merge_method: breadcrumbs\nparameters: {density: 0.6, gamma: 0.1, lambda: 0.5}\ndtype: float64",
    breadcrumbs_each=weighed(density=[.6, .4, .8], gamma=[.1, .2, .05]) + "merge_method: breadcrumbs\ndtype: float64",
    breadcrumbs_mean=weighed() + "merge_method: breadcrumbs\nparameters: {density: 0.6, normalize: true}\ndtype: float64",
    breadcrumbs_ties=weighed() + "merge_method: breadcrumbs_ties\nparameters: {density: 0.6, normalize: true}\ndtype: float64",
    breadcrumbs_ties_sum=weighed() + "merge_method: breadcrumbs_ties\nparameters: {density: 0.6}\ndtype: float64",
    sce=XYZ + "merge_method: sce\nbase_model: llama-b\nparameters: {select_topk: [0.3, 0.9]}\ndtype: float64",
    # random ones, with nothing to draw
    dare_linear=weighed() + "merge_method: dare_linear\nparameters: {lambda: [0.5, 1]}\ndtype: float64",
    dare_linear_mean=weighed() + "merge_method: dare_linear\nparameters: {normalize: true}\ndtype: float64",
    dare_ties=weighed() + "merge_method: dare_ties\nparameters: {normalize: true}\ndtype: float64",
    dare_ties_sum=weighed() + "merge_method: dare_ties\ndtype: float64",
    della=weighed() + "merge_method: della\ndtype: float64",
    della_linear=weighed() + "merge_method: della_linear\nparameters: {epsilon: 0.2, density: 1}\ndtype: float64")


def main():
    import os
    import tempfile
    os.environ |= dict(HF_HUB_OFFLINE='1', HF_HUB_DISABLE_PROGRESS_BARS='1', TQDM_DISABLE='1')
    import torch
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions
    from safetensors.torch import load_file, save_file
    out = {}
    with tempfile.TemporaryDirectory() as d:
        os.chdir(d) # the recipes name folders beside them
        for name in (f'{kind}-{who}' for kind in CONFIGS for who in 'bxyz' + 'cmnop' * (kind == 'llama')):
            Path(name).mkdir()
            (Path(name)/'config.json').write_text(json.dumps(CONFIGS[name.split('-')[0]]))
            save_file({k: torch.from_numpy(v) for k, v in model(name).items()}, f'{name}/model.safetensors', {'format': 'pt'})
        for name, text in RECIPES.items():
            options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
            run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), name, options)
            fused, ks = load_file(f'{name}/model.safetensors'), kept(name if name in CONFIGS else 'llama')
            dtypes = {str(fused[k].dtype).removeprefix('torch.') for k in ks}
            assert len(dtypes) == 1, (name, dtypes)
            out[f'{name} {dtypes.pop()}'] = np.concatenate([fused[k].double().numpy().ravel() for k in ks]).astype(np.float32)
    about = dict(mergekit=version('mergekit'), torch=torch.__version__, numpy=np.__version__, python=platform.python_version())
    np.savez_compressed(TO, about=json.dumps(about), **out)


TO = Path(__file__).resolve().with_suffix('.npz')
if __name__ == '__main__': sys.exit(main())
