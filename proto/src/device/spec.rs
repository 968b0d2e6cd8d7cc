//! `Device.spec` as users write it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// A Device as the edge stores it: what is needed of its metadata, and its spec.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Device {
    /// The object's metadata, whole.
    pub metadata: Map<String, Value>,
    /// What is asked for.
    pub spec: DeviceSpec,
}

impl Device {
    /// The generation of the spec; 0 when the object has none.
    pub fn generation(&self) -> i64 {
        self.metadata
            .get("generation")
            .and_then(Value::as_i64)
            .unwrap_or_default()
    }
}

/// What a user asks of a device. Unknown fields are accepted and left alone.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct DeviceSpec {
    /// A name (`modbus`), or KubeEdge's `{protocolName, configData}`.
    pub protocol: Value,
    /// How the device is reached; for Modbus `host`, `port` (502), `unitId` (1), `timeout` (1s). Alias of `configData`.
    pub connection: Map<String, Value>,
    /// A DeviceModel. Not supported yet: the device is not accepted, and says so.
    pub device_model_ref: Option<ModelRef>,
    /// The node that talks to the device.
    pub node_name: Option<String>,
    /// Labels of the one node that talks to the device.
    pub node_selector: Option<Value>,
    /// Stop talking to the device.
    pub suspend: bool,
    /// What is read of the device.
    pub properties: Vec<DevicePropertySpec>,
    /// Values to write, by property. Not written yet: the condition `DesiredApplied` says so.
    pub desired: BTreeMap<String, Value>,
}

/// Names a DeviceModel in the device's namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ModelRef {
    /// The model's name.
    pub name: String,
}

/// One property of a device.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct DevicePropertySpec {
    /// Its name, unique in the device.
    pub name: String,
    /// `boolean`, `int`, `int8` to `uint64`, `float`, `double`, `string`…, in any case.
    #[serde(rename = "type")]
    pub value_type: String,
    /// `ReadOnly` (default), `ReadWrite` or `WriteOnly`.
    pub access_mode: Option<String>,
    /// Least value that makes sense, in engineering units. A number, or a number as text.
    pub minimum: Option<Value>,
    /// Greatest value that makes sense, in engineering units.
    pub maximum: Option<Value>,
    /// `scale`, `offset`, `unit`, `precision`, and where the value is found.
    pub descriptor: Map<String, Value>,
    /// KubeEdge's `{protocolName, configData}` of a property.
    pub visitors: Map<String, Value>,
    /// How often it is read.
    pub sampling: SamplingSpec,
    /// How often it is reported.
    pub report: ReportSpec,
    /// KubeEdge's sampling interval, in milliseconds.
    pub collect_cycle: Option<u64>,
    /// KubeEdge's reporting interval, in milliseconds.
    pub report_cycle: Option<u64>,
    /// KubeEdge's place for a value to write.
    pub desired: Option<DesiredValue>,
}

/// How often a property is read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SamplingSpec {
    /// A duration; 1s when absent, at least 10ms.
    pub interval: Option<String>,
}

/// How often a property is reported when nothing but its value changes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ReportSpec {
    /// Least time between two reports; 10s when absent, at least 1s.
    pub min_interval: Option<String>,
    /// A report comes at least this often; 5m when absent.
    pub heartbeat: Option<String>,
}

/// A value to write, as KubeEdge spells it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DesiredValue {
    /// The value.
    pub value: Value,
}
