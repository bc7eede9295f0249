from quartet.common.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class InFlightPolicy(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    IN_FLIGHT_POLICY_UNSPECIFIED: _ClassVar[InFlightPolicy]
    IN_FLIGHT_POLICY_KEEP: _ClassVar[InFlightPolicy]
    IN_FLIGHT_POLICY_FINISH: _ClassVar[InFlightPolicy]
    IN_FLIGHT_POLICY_ABORT: _ClassVar[InFlightPolicy]
IN_FLIGHT_POLICY_UNSPECIFIED: InFlightPolicy
IN_FLIGHT_POLICY_KEEP: InFlightPolicy
IN_FLIGHT_POLICY_FINISH: InFlightPolicy
IN_FLIGHT_POLICY_ABORT: InFlightPolicy

class UpdateWeightsRequest(_message.Message):
    __slots__ = ("begin", "chunk", "commit")
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    begin: BeginUpdate
    chunk: TensorChunk
    commit: CommitUpdate
    def __init__(self, begin: _Optional[_Union[BeginUpdate, _Mapping]] = ..., chunk: _Optional[_Union[TensorChunk, _Mapping]] = ..., commit: _Optional[_Union[CommitUpdate, _Mapping]] = ...) -> None: ...

class BeginUpdate(_message.Message):
    __slots__ = ("weights_version", "tensors", "in_flight")
    WEIGHTS_VERSION_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    weights_version: int
    tensors: _containers.RepeatedCompositeFieldContainer[TensorSpec]
    in_flight: InFlightPolicy
    def __init__(self, weights_version: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[TensorSpec, _Mapping]]] = ..., in_flight: _Optional[_Union[InFlightPolicy, str]] = ...) -> None: ...

class TensorSpec(_message.Message):
    __slots__ = ("name", "dtype", "shape")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class TensorChunk(_message.Message):
    __slots__ = ("tensor_index", "data")
    TENSOR_INDEX_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    tensor_index: int
    data: bytes
    def __init__(self, tensor_index: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class CommitUpdate(_message.Message):
    __slots__ = ("weights_fingerprint",)
    WEIGHTS_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    weights_fingerprint: str
    def __init__(self, weights_fingerprint: _Optional[str] = ...) -> None: ...

class UpdateWeightsResponse(_message.Message):
    __slots__ = ("served_by", "received_bytes", "pause_seconds")
    SERVED_BY_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    PAUSE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    served_by: _common_pb2.ServedBy
    received_bytes: int
    pause_seconds: float
    def __init__(self, served_by: _Optional[_Union[_common_pb2.ServedBy, _Mapping]] = ..., received_bytes: _Optional[int] = ..., pause_seconds: _Optional[float] = ...) -> None: ...

class GetWeightsInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetWeightsInfoResponse(_message.Message):
    __slots__ = ("served_by",)
    SERVED_BY_FIELD_NUMBER: _ClassVar[int]
    served_by: _common_pb2.ServedBy
    def __init__(self, served_by: _Optional[_Union[_common_pb2.ServedBy, _Mapping]] = ...) -> None: ...
