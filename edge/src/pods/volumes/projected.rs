//! The files of configMap, secret, downwardAPI and projected volumes.

use std::collections::BTreeMap;
use std::path::PathBuf;

use k8s_openapi::api::core::v1::{DownwardAPIVolumeFile, KeyToPath, Pod, Volume, VolumeProjection};

use super::atomic::{Payload, Projected};
use super::owner::single_user;
use crate::pods::env::{Facts, field_value, resource_value};

/// The files of a volume, or why it cannot be filled yet. `None` when the volume is not of these kinds.
pub(crate) fn payload(facts: &Facts<'_>, volume: &Volume) -> Option<Result<Payload, String>> {
    let mut builder = Builder {
        facts,
        volume: &volume.name,
        mode: 0o644,
        files: Payload::new(),
    };
    let done = if let Some(source) = &volume.config_map {
        builder.mode(source.default_mode);
        builder.config_map(&source.name, source.items.as_deref(), source.optional)
    } else if let Some(source) = &volume.secret {
        builder.mode(source.default_mode);
        builder.secret(
            source.secret_name.as_deref().unwrap_or_default(),
            source.items.as_deref(),
            source.optional,
        )
    } else if let Some(source) = &volume.downward_api {
        builder.mode(source.default_mode);
        builder.downward(source.items.as_deref().unwrap_or_default())
    } else if let Some(source) = &volume.projected {
        builder.mode(source.default_mode);
        builder.projected(source.sources.as_deref().unwrap_or_default())
    } else {
        return None;
    };
    Some(done.map(|()| builder.files))
}

struct Builder<'a> {
    facts: &'a Facts<'a>,
    volume: &'a str,
    mode: u32,
    files: Payload,
}

impl Builder<'_> {
    fn mode(&mut self, mode: Option<i32>) {
        self.mode = mode.and_then(|m| u32::try_from(m).ok()).unwrap_or(0o644);
    }

    fn namespace(&self) -> &str {
        self.facts.pod.metadata.namespace.as_deref().unwrap_or_default()
    }

    fn put(&mut self, path: &str, data: Vec<u8>, mode: Option<i32>) {
        let mode = mode.and_then(|m| u32::try_from(m).ok()).unwrap_or(self.mode);
        let owner = None;
        self.files
            .insert(PathBuf::from(path), Projected { data, mode, owner });
    }

    fn keys(
        &mut self,
        what: &str,
        data: BTreeMap<String, Vec<u8>>,
        items: Option<&[KeyToPath]>,
        optional: bool,
    ) -> Result<(), String> {
        let Some(items) = items.filter(|i| !i.is_empty()) else {
            for (key, value) in data {
                self.put(&key, value, None);
            }
            return Ok(());
        };
        for item in items {
            match data.get(&item.key) {
                Some(value) => self.put(&item.path, value.clone(), item.mode),
                None if optional => {}
                None => {
                    let kind = if what == "configmap" { "config" } else { what };
                    return Err(format!("{what} references non-existent {kind} key: {}", item.key));
                }
            }
        }
        Ok(())
    }

    fn config_map(
        &mut self,
        name: &str,
        items: Option<&[KeyToPath]>,
        optional: Option<bool>,
    ) -> Result<(), String> {
        let optional = optional == Some(true);
        let Some(map) = self.facts.objects.config_map(self.namespace(), name) else {
            return if optional {
                Ok(())
            } else {
                Err(format!("configmap \"{name}\" not found"))
            };
        };
        let mut data: BTreeMap<_, _> = map
            .data
            .unwrap_or_default()
            .into_iter()
            .map(|(key, text)| (key, text.into_bytes()))
            .collect();
        data.extend(
            map.binary_data
                .unwrap_or_default()
                .into_iter()
                .map(|(key, bytes)| (key, bytes.0)),
        );
        self.keys("configmap", data, items, optional)
    }

    fn secret(
        &mut self,
        name: &str,
        items: Option<&[KeyToPath]>,
        optional: Option<bool>,
    ) -> Result<(), String> {
        let optional = optional == Some(true);
        let Some(secret) = self.facts.objects.secret(self.namespace(), name) else {
            return if optional {
                Ok(())
            } else {
                Err(format!("secret \"{name}\" not found"))
            };
        };
        let data = secret
            .data
            .unwrap_or_default()
            .into_iter()
            .map(|(key, bytes)| (key, bytes.0))
            .collect();
        self.keys("secret", data, items, optional)
    }

    fn downward(&mut self, items: &[DownwardAPIVolumeFile]) -> Result<(), String> {
        for item in items {
            let value = if let Some(field) = &item.field_ref {
                field_value(self.facts, &field.field_path)
            } else if let Some(field) = &item.resource_field_ref {
                resource_value(self.facts, None, field)
            } else {
                continue;
            };
            self.put(
                &item.path,
                value.map_err(|e| e.to_string())?.into_bytes(),
                item.mode,
            );
        }
        Ok(())
    }

    /// Every source, so that all that is missing is named at once.
    fn projected(&mut self, sources: &[VolumeProjection]) -> Result<(), String> {
        let mut errors: Vec<String> = sources
            .iter()
            .filter_map(|source| self.source(source).err())
            .collect();
        match errors.len() {
            0 => Ok(()),
            1 => Err(errors.remove(0)),
            _ => Err(format!("[{}]", errors.join(", "))),
        }
    }

    fn source(&mut self, source: &VolumeProjection) -> Result<(), String> {
        if let Some(s) = &source.config_map {
            self.config_map(&s.name, s.items.as_deref(), s.optional)
        } else if let Some(s) = &source.secret {
            self.secret(&s.name, s.items.as_deref(), s.optional)
        } else if let Some(s) = &source.downward_api {
            self.downward(s.items.as_deref().unwrap_or_default())
        } else if let Some(s) = &source.service_account_token {
            self.token(&s.path)
        } else {
            Err(super::unsupported::projection(source))
        }
    }

    fn token(&mut self, path: &str) -> Result<(), String> {
        let uid = self.facts.pod.metadata.uid.as_deref().unwrap_or_default();
        let key = format!("{uid}/{}/{path}", self.volume);
        let token = self.facts.objects.token(&key).ok_or_else(|| {
            let spec = self.facts.pod.spec.as_ref();
            let account = spec.and_then(|s| s.service_account_name.as_deref());
            format!(
                "failed to fetch token: the token of service account {}/{} has not been received from the cluster yet",
                self.namespace(),
                account.unwrap_or("default")
            )
        })?;
        let owner = single_user(self.facts.pod);
        // Whoever else runs in the pod has no business with it; the group's bit comes with the group.
        let mode = if owner.is_some() || has_group(self.facts.pod) {
            0o600
        } else {
            self.mode
        };
        let data = token.into_bytes();
        self.files
            .insert(PathBuf::from(path), Projected { data, mode, owner });
        Ok(())
    }
}

fn has_group(pod: &Pod) -> bool {
    let context = pod.spec.as_ref().and_then(|s| s.security_context.as_ref());
    context.is_some_and(|c| c.fs_group.is_some())
}
