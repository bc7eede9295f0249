from quartet.common.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TruncationPolicy(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TRUNCATION_POLICY_UNSPECIFIED: _ClassVar[TruncationPolicy]
    TRUNCATION_POLICY_REFUSE: _ClassVar[TruncationPolicy]
    TRUNCATION_POLICY_LEFT: _ClassVar[TruncationPolicy]
    TRUNCATION_POLICY_RIGHT: _ClassVar[TruncationPolicy]
    TRUNCATION_POLICY_AS_TRAINED: _ClassVar[TruncationPolicy]

class EnsembleReduction(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ENSEMBLE_REDUCTION_UNSPECIFIED: _ClassVar[EnsembleReduction]
    ENSEMBLE_REDUCTION_MEAN: _ClassVar[EnsembleReduction]
    ENSEMBLE_REDUCTION_WORST_CASE: _ClassVar[EnsembleReduction]
    ENSEMBLE_REDUCTION_UNCERTAINTY: _ClassVar[EnsembleReduction]
TRUNCATION_POLICY_UNSPECIFIED: TruncationPolicy
TRUNCATION_POLICY_REFUSE: TruncationPolicy
TRUNCATION_POLICY_LEFT: TruncationPolicy
TRUNCATION_POLICY_RIGHT: TruncationPolicy
TRUNCATION_POLICY_AS_TRAINED: TruncationPolicy
ENSEMBLE_REDUCTION_UNSPECIFIED: EnsembleReduction
ENSEMBLE_REDUCTION_MEAN: EnsembleReduction
ENSEMBLE_REDUCTION_WORST_CASE: EnsembleReduction
ENSEMBLE_REDUCTION_UNCERTAINTY: EnsembleReduction

class ScoreRequest(_message.Message):
    __slots__ = ("items", "tokenizer_fingerprint", "normalise", "truncation", "head_weights")
    class HeadWeightsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    NORMALISE_FIELD_NUMBER: _ClassVar[int]
    TRUNCATION_FIELD_NUMBER: _ClassVar[int]
    HEAD_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[ScoreItem]
    tokenizer_fingerprint: str
    normalise: bool
    truncation: TruncationPolicy
    head_weights: _containers.ScalarMap[str, float]
    def __init__(self, items: _Optional[_Iterable[_Union[ScoreItem, _Mapping]]] = ..., tokenizer_fingerprint: _Optional[str] = ..., normalise: _Optional[bool] = ..., truncation: _Optional[_Union[TruncationPolicy, str]] = ..., head_weights: _Optional[_Mapping[str, float]] = ...) -> None: ...

class ScoreItem(_message.Message):
    __slots__ = ("prompt", "response_text", "response_token_ids", "response_unfinished")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_TEXT_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_UNFINISHED_FIELD_NUMBER: _ClassVar[int]
    prompt: _common_pb2.Prompt
    response_text: str
    response_token_ids: _common_pb2.TokenIds
    response_unfinished: bool
    def __init__(self, prompt: _Optional[_Union[_common_pb2.Prompt, _Mapping]] = ..., response_text: _Optional[str] = ..., response_token_ids: _Optional[_Union[_common_pb2.TokenIds, _Mapping]] = ..., response_unfinished: _Optional[bool] = ...) -> None: ...

class ScoreResult(_message.Message):
    __slots__ = ("status", "score", "normalised_score", "token_count", "truncated", "attributes", "spread", "member_scores")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    NORMALISED_SCORE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    SPREAD_FIELD_NUMBER: _ClassVar[int]
    MEMBER_SCORES_FIELD_NUMBER: _ClassVar[int]
    status: _common_pb2.ItemStatus
    score: float
    normalised_score: float
    token_count: int
    truncated: bool
    attributes: _containers.RepeatedCompositeFieldContainer[Attribute]
    spread: float
    member_scores: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, status: _Optional[_Union[_common_pb2.ItemStatus, _Mapping]] = ..., score: _Optional[float] = ..., normalised_score: _Optional[float] = ..., token_count: _Optional[int] = ..., truncated: _Optional[bool] = ..., attributes: _Optional[_Iterable[_Union[Attribute, _Mapping]]] = ..., spread: _Optional[float] = ..., member_scores: _Optional[_Iterable[float]] = ...) -> None: ...

class Attribute(_message.Message):
    __slots__ = ("name", "score")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    name: str
    score: float
    def __init__(self, name: _Optional[str] = ..., score: _Optional[float] = ...) -> None: ...

class ScoreResponse(_message.Message):
    __slots__ = ("results", "served_by", "work")
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    SERVED_BY_FIELD_NUMBER: _ClassVar[int]
    WORK_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[ScoreResult]
    served_by: _common_pb2.ServedBy
    work: _common_pb2.WorkInterval
    def __init__(self, results: _Optional[_Iterable[_Union[ScoreResult, _Mapping]]] = ..., served_by: _Optional[_Union[_common_pb2.ServedBy, _Mapping]] = ..., work: _Optional[_Union[_common_pb2.WorkInterval, _Mapping]] = ...) -> None: ...

class CompareRequest(_message.Message):
    __slots__ = ("items", "tokenizer_fingerprint", "truncation", "head_weights")
    class HeadWeightsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TRUNCATION_FIELD_NUMBER: _ClassVar[int]
    HEAD_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[Comparison]
    tokenizer_fingerprint: str
    truncation: TruncationPolicy
    head_weights: _containers.ScalarMap[str, float]
    def __init__(self, items: _Optional[_Iterable[_Union[Comparison, _Mapping]]] = ..., tokenizer_fingerprint: _Optional[str] = ..., truncation: _Optional[_Union[TruncationPolicy, str]] = ..., head_weights: _Optional[_Mapping[str, float]] = ...) -> None: ...

class Comparison(_message.Message):
    __slots__ = ("prompt", "first", "second")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    SECOND_FIELD_NUMBER: _ClassVar[int]
    prompt: _common_pb2.Prompt
    first: Response
    second: Response
    def __init__(self, prompt: _Optional[_Union[_common_pb2.Prompt, _Mapping]] = ..., first: _Optional[_Union[Response, _Mapping]] = ..., second: _Optional[_Union[Response, _Mapping]] = ...) -> None: ...

class Response(_message.Message):
    __slots__ = ("text", "token_ids", "unfinished")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    UNFINISHED_FIELD_NUMBER: _ClassVar[int]
    text: str
    token_ids: _common_pb2.TokenIds
    unfinished: bool
    def __init__(self, text: _Optional[str] = ..., token_ids: _Optional[_Union[_common_pb2.TokenIds, _Mapping]] = ..., unfinished: _Optional[bool] = ...) -> None: ...

class CompareResult(_message.Message):
    __slots__ = ("status", "probability", "first", "second", "member_probabilities")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    SECOND_FIELD_NUMBER: _ClassVar[int]
    MEMBER_PROBABILITIES_FIELD_NUMBER: _ClassVar[int]
    status: _common_pb2.ItemStatus
    probability: float
    first: ScoreResult
    second: ScoreResult
    member_probabilities: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, status: _Optional[_Union[_common_pb2.ItemStatus, _Mapping]] = ..., probability: _Optional[float] = ..., first: _Optional[_Union[ScoreResult, _Mapping]] = ..., second: _Optional[_Union[ScoreResult, _Mapping]] = ..., member_probabilities: _Optional[_Iterable[float]] = ...) -> None: ...

class CompareResponse(_message.Message):
    __slots__ = ("results", "served_by", "work")
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    SERVED_BY_FIELD_NUMBER: _ClassVar[int]
    WORK_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[CompareResult]
    served_by: _common_pb2.ServedBy
    work: _common_pb2.WorkInterval
    def __init__(self, results: _Optional[_Iterable[_Union[CompareResult, _Mapping]]] = ..., served_by: _Optional[_Union[_common_pb2.ServedBy, _Mapping]] = ..., work: _Optional[_Union[_common_pb2.WorkInterval, _Mapping]] = ...) -> None: ...

class Normalisation(_message.Message):
    __slots__ = ("mean", "std", "count")
    MEAN_FIELD_NUMBER: _ClassVar[int]
    STD_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    mean: float
    std: float
    count: int
    def __init__(self, mean: _Optional[float] = ..., std: _Optional[float] = ..., count: _Optional[int] = ...) -> None: ...

class GetModelInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetModelInfoResponse(_message.Message):
    __slots__ = ("model", "normalisation", "heads", "ensemble", "trained_truncation", "trained_max_tokens", "temperature")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    NORMALISATION_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    ENSEMBLE_FIELD_NUMBER: _ClassVar[int]
    TRAINED_TRUNCATION_FIELD_NUMBER: _ClassVar[int]
    TRAINED_MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    model: _common_pb2.ModelInfo
    normalisation: Normalisation
    heads: _containers.RepeatedCompositeFieldContainer[Head]
    ensemble: Ensemble
    trained_truncation: TruncationPolicy
    trained_max_tokens: int
    temperature: float
    def __init__(self, model: _Optional[_Union[_common_pb2.ModelInfo, _Mapping]] = ..., normalisation: _Optional[_Union[Normalisation, _Mapping]] = ..., heads: _Optional[_Iterable[_Union[Head, _Mapping]]] = ..., ensemble: _Optional[_Union[Ensemble, _Mapping]] = ..., trained_truncation: _Optional[_Union[TruncationPolicy, str]] = ..., trained_max_tokens: _Optional[int] = ..., temperature: _Optional[float] = ...) -> None: ...

class Head(_message.Message):
    __slots__ = ("name", "weight", "python")
    NAME_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    PYTHON_FIELD_NUMBER: _ClassVar[int]
    name: str
    weight: float
    python: bool
    def __init__(self, name: _Optional[str] = ..., weight: _Optional[float] = ..., python: _Optional[bool] = ...) -> None: ...

class Ensemble(_message.Message):
    __slots__ = ("members", "reduction", "variance_penalty")
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    REDUCTION_FIELD_NUMBER: _ClassVar[int]
    VARIANCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    members: _containers.RepeatedCompositeFieldContainer[EnsembleMember]
    reduction: EnsembleReduction
    variance_penalty: float
    def __init__(self, members: _Optional[_Iterable[_Union[EnsembleMember, _Mapping]]] = ..., reduction: _Optional[_Union[EnsembleReduction, str]] = ..., variance_penalty: _Optional[float] = ...) -> None: ...

class EnsembleMember(_message.Message):
    __slots__ = ("model_id", "weights_fingerprint", "normalisation", "temperature")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    NORMALISATION_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    weights_fingerprint: str
    normalisation: Normalisation
    temperature: float
    def __init__(self, model_id: _Optional[str] = ..., weights_fingerprint: _Optional[str] = ..., normalisation: _Optional[_Union[Normalisation, _Mapping]] = ..., temperature: _Optional[float] = ...) -> None: ...
