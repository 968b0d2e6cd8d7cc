//! Entry for hostile bytes: what a container engine may answer.

use prost::Message;

use super::{api, client, exits, inventory, usage};

/// The first byte chooses what the others are.
pub(crate) fn any_answer(bytes: &[u8]) {
    let Some((choice, rest)) = bytes.split_first() else {
        return;
    };
    match choice % 6 {
        0 => exits::decode_any(rest),
        1 => {
            if let Ok(list) = api::ListContainersResponse::decode(rest) {
                for brief in list.containers {
                    let status = api::ContainerStatus {
                        created_at: brief.created_at,
                        started_at: brief.created_at.wrapping_neg(),
                        state: brief.state,
                        ..api::ContainerStatus::default()
                    };
                    let _ = inventory::container(brief, status);
                }
            }
        }
        2 => {
            if let Ok(answer) = api::ContainerStatusResponse::decode(rest) {
                let _ = client::pid(&answer.info);
                let status = answer.status.unwrap_or_default();
                let _ = inventory::container(api::Container::default(), status);
            }
        }
        3 => {
            if let Ok(answer) = api::PodSandboxStatusResponse::decode(rest) {
                let _ = client::pid(&answer.info);
                let status = answer.status.unwrap_or_default();
                let _ = inventory::sandbox(api::PodSandbox::default(), &status);
            }
        }
        4 => {
            if let Ok(answer) = api::StatusResponse::decode(rest) {
                let _ = inventory::features(&answer);
                let _ = inventory::runtime_status(&answer.status.unwrap_or_default().conditions);
            }
        }
        _ => {
            if let Ok(list) = api::ListContainerStatsResponse::decode(rest) {
                list.stats.into_iter().for_each(|one| drop(usage::layer(one)));
            }
            if let Ok(answer) = api::ImageFsInfoResponse::decode(rest) {
                answer
                    .image_filesystems
                    .iter()
                    .for_each(|one| drop(usage::disk(one)));
            }
            if let Ok(list) = api::ListImagesResponse::decode(rest) {
                list.images
                    .into_iter()
                    .for_each(|one| drop(inventory::image(one)));
            }
        }
    }
}

pub(crate) fn answer_seeds() -> Vec<Vec<u8>> {
    let with = |choice: u8, rest: Vec<u8>| [vec![choice], rest].concat();
    let status = api::ContainerStatus {
        id: "c".to_owned(),
        state: api::ContainerState::ContainerExited.into(),
        created_at: 1,
        started_at: i64::MIN,
        finished_at: i64::MAX,
        exit_code: 137,
        ..api::ContainerStatus::default()
    };
    let info = std::collections::HashMap::from([("info".to_owned(), r#"{"pid": 7}"#.to_owned())]);
    let answer = api::ContainerStatusResponse {
        status: Some(status),
        info: info.clone(),
    };
    let sandbox = api::PodSandboxStatusResponse {
        status: Some(api::PodSandboxStatus {
            network: Some(api::PodSandboxNetworkStatus {
                ip: "10.0.0.1".to_owned(),
                ..Default::default()
            }),
            ..Default::default()
        }),
        info,
    };
    let list = api::ListContainersResponse {
        containers: vec![api::Container {
            id: "c".to_owned(),
            annotations: [(crate::runtime::labels::RESTART_COUNT.to_owned(), "3".to_owned())].into(),
            ..Default::default()
        }],
    };
    let mut seeds = vec![
        with(1, list.encode_to_vec()),
        with(2, answer.encode_to_vec()),
        with(3, sandbox.encode_to_vec()),
        with(4, vec![10, 4, 10, 2, 8, 1]),
        with(5, vec![10, 4, 10, 2, 10, 0]),
    ];
    seeds.extend(exits::seeds().into_iter().map(|seed| with(0, seed)));
    seeds
}
