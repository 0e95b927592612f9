"""Every error of the client. The network's and the service's faults are requests.exceptions.RequestException too.

NexRLError
├── ClientError                 misuse, nothing was sent (also ValueError)
│   ├── InvalidURL              the address is no http or https address
│   ├── UnknownBackend, UnknownOption       create_train_service_client
│   ├── UnknownOperation        submit
│   ├── InvalidBatch            a batch that cannot be sent as it is
│   ├── InvalidSetup            initialize_worker's configuration cannot be read, or names no group
│   └── ClientClosed            the client was closed before the call
└── ServiceFault                (also RequestException)
    ├── Unreachable             no connection, or a lost one, until the time was spent (also ConnectionError)
    ├── InvalidAnswer           an answer that the service does not give (a proxy's page, a broken frame)
    ├── ServiceTimeout          no result in time; .job is the job, which goes on (also Timeout)
    └── StatusError             the service, or a proxy before it, said no (also HTTPError)
        ├── Rejected            4xx: the request cannot succeed as it is, and changed nothing
        │   ├── Malformed, TooLarge, HeadersTooLarge, UnsupportedType, IdentifierRequired, MethodNotAllowed
        │   ├── ForeignOrigin, HostRefused
        │   ├── GroupNotFound, JobNotFound, PayloadNotFound, NotFound, Expired
        │   ├── GroupNotReady, GroupExists, RoleUnsupported, IdempotencyMismatch
        │   ├── GradientsPending, GradientsLost
        │   ├── JobRunning, JobFinal, JobCancelled, JobRolledBack
        │   ├── InvalidArgument, InvalidTensor, InvalidValue, InvalidConfig
        │   └── PathRefused, CheckpointInvalid, NoSuchSlots, HDFSNotConfigured
        ├── Failed              500: the operation (.rank says where) or the service failed
        │   └── OperationFailed, PayloadDamaged, InternalError
        └── Unavailable         the same request may succeed later
            ├── TooManyQueued, GroupDown, RedisUnavailable, StoreUnavailable
            ├── GatewayBusy, SlowRequest
            └── WaitLimit, NoSpace, ChecksumMismatch
"""

from ._errors_base import (
    ClientClosed,
    ClientError,
    Failed,
    InvalidAnswer,
    InvalidBatch,
    InvalidSetup,
    InvalidURL,
    NexRLError,
    Rejected,
    ServiceFault,
    ServiceTimeout,
    StatusError,
    Unavailable,
    UnknownBackend,
    UnknownOperation,
    UnknownOption,
    Unreachable,
)
from ._errors_status import (
    CheckpointInvalid,
    ChecksumMismatch,
    Expired,
    ForeignOrigin,
    GatewayBusy,
    GradientsLost,
    GradientsPending,
    GroupDown,
    GroupExists,
    GroupNotFound,
    GroupNotReady,
    HDFSNotConfigured,
    HeadersTooLarge,
    HostRefused,
    IdempotencyMismatch,
    IdentifierRequired,
    InternalError,
    InvalidArgument,
    InvalidConfig,
    InvalidTensor,
    InvalidValue,
    JobCancelled,
    JobFinal,
    JobNotFound,
    JobRolledBack,
    JobRunning,
    Malformed,
    MethodNotAllowed,
    NoSpace,
    NoSuchSlots,
    NotFound,
    OperationFailed,
    PathRefused,
    PayloadDamaged,
    PayloadNotFound,
    RedisUnavailable,
    RoleUnsupported,
    SlowRequest,
    StoreUnavailable,
    TooLarge,
    TooManyQueued,
    UnsupportedType,
    WaitLimit,
)

__all__ = [
    "CheckpointInvalid",
    "ChecksumMismatch",
    "ClientClosed",
    "ClientError",
    "Expired",
    "Failed",
    "ForeignOrigin",
    "GatewayBusy",
    "GradientsLost",
    "GradientsPending",
    "GroupDown",
    "GroupExists",
    "GroupNotFound",
    "GroupNotReady",
    "HDFSNotConfigured",
    "HeadersTooLarge",
    "HostRefused",
    "IdempotencyMismatch",
    "IdentifierRequired",
    "InternalError",
    "InvalidAnswer",
    "InvalidArgument",
    "InvalidBatch",
    "InvalidConfig",
    "InvalidSetup",
    "InvalidTensor",
    "InvalidURL",
    "InvalidValue",
    "JobCancelled",
    "JobFinal",
    "JobNotFound",
    "JobRolledBack",
    "JobRunning",
    "Malformed",
    "MethodNotAllowed",
    "NexRLError",
    "NoSpace",
    "NoSuchSlots",
    "NotFound",
    "OperationFailed",
    "PathRefused",
    "PayloadDamaged",
    "PayloadNotFound",
    "RedisUnavailable",
    "Rejected",
    "RoleUnsupported",
    "ServiceFault",
    "ServiceTimeout",
    "SlowRequest",
    "StatusError",
    "StoreUnavailable",
    "TooLarge",
    "TooManyQueued",
    "Unavailable",
    "UnknownBackend",
    "UnknownOperation",
    "UnknownOption",
    "Unreachable",
    "UnsupportedType",
    "WaitLimit",
]
