# Text to token sequences: documents, tokenizer, tokens.


localrules:
    all_corpus,


rule all_corpus:
    input:
        "results/corpus/tokens",


rule corpus_documents:
    input:
        corpus_files,
    output:
        "results/corpus/documents.parquet",
    log:
        "logs/corpus/documents.log",
    benchmark:
        "logs/corpus/documents.tsv"
    params:
        settings=section(study.corpus.documents),
        code=code("corpus"),
    shell:
        "universality corpus documents --settings {params.settings:q} --out {output} --log {log}"


rule corpus_tokenizer:
    input:
        tokenizer_files(study.corpus.tokenizer),
        documents="results/corpus/documents.parquet",
    output:
        directory("results/corpus/tokenizer"),
    log:
        "logs/corpus/tokenizer.log",
    benchmark:
        "logs/corpus/tokenizer.tsv"
    params:
        settings=as_json(tokenizer=study.corpus.tokenizer),
        code=code("corpus"),
    shell:
        "universality corpus tokenizer --settings {params.settings:q} --documents {input.documents}"
        " --out {output} --log {log}"


rule corpus_tokens:
    input:
        documents="results/corpus/documents.parquet",
        tokenizer="results/corpus/tokenizer",
    output:
        directory("results/corpus/tokens"),
    log:
        "logs/corpus/tokens.log",
    benchmark:
        "logs/corpus/tokens.tsv"
    params:
        length=study.corpus.sequence_length,
        code=code("corpus"),
    shell:
        "universality corpus tokens --documents {input.documents} --tokenizer {input.tokenizer}"
        " --sequence-length {params.length} --out {output} --log {log}"
