"What every setting of a study in a test begins with: a tiny ViT, few examples, two epochs."

TINY = '''
[DEFAULT]
model = tiny-vit
train_size = 60
val_size = 20
test_size = 30
data_seed = 0
lr = 2e-3
head_lr = 1e-2
epochs = 2
batch_size = 16
weight_decay = 0.01
warmup = 0.1
freeze =
max_tokens = 8
precision = float32
threads = 1
seeds = 0
orders = 0
workers = 1
tracking = none
evaluate = seen
stat_examples = 16
'''
